"""Our value of every tensor recorded from the two families of video codecs."""

from collections.abc import Iterator
from typing import Any

import torch
from recorded.fast_wam import under
from torch import Tensor

from wam_policy.hub.foreign import key_mapping
from wam_policy.models.encoders.vae import VAE, build_vae


def build(recorded: dict[str, Tensor], info: dict[str, Any], family: str) -> VAE:
    """The recorded codec."""
    residual = family == "vae38"
    stages, blocks = len(info["dim_mult"]), info["num_res_blocks"]
    config = {
        "base_dim": info["dim38" if residual else "dim16"],
        "z_dim": info["z38" if residual else "z16"],
        "dim_mult": info["dim_mult"],
        "num_res_blocks": blocks,
        "temperal_downsample": info["temporal_downsample"],
        "scale_factor_temporal": 2 ** sum(info["temporal_downsample"]),
        "latents_mean": recorded[f"{family}/latents_mean"].tolist(),
        "latents_std": recorded[f"{family}/latents_std"].tolist(),
    }
    if residual:
        config |= {
            "decoder_base_dim": info["dec38"],
            "is_residual": True,
            "patch_size": 2,
            "in_channels": 12,
        }
        config |= {"out_channels": 12, "scale_factor_spatial": 2**stages}
    else:
        config |= {"scale_factor_spatial": 2 ** (stages - 1)}
    vae = build_vae(config)
    weights = under(recorded, f"{family}/weights/")
    vae.model.load_state_dict(
        key_mapping.to_native(weights, key_mapping.wan_vae(stages, blocks, residual=residual))
    )
    return vae


@torch.no_grad()
def tensors(recorded: dict[str, Tensor], info: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Our value of each recorded tensor; the reconstruction is clamped, as the decoder does."""
    video = recorded["in/video"]
    for family in ("vae38", "vae16"):
        if f"{family}/latents" not in recorded:
            continue
        vae = build(recorded, info, family)
        latents = vae.encode(video)
        yield f"{family}/latents", latents
        yield f"{family}/latents_first_frame", vae.encode_first_frame(video[:, :, 0])
        yield f"{family}/reconstruction", vae.decode(recorded[f"{family}/latents"])
        for name in ("mean", "std"):
            yield f"{family}/latents_{name}", getattr(vae, name).flatten()
