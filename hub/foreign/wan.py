"""Reads the configurations of the frozen parts' original files off their tensors' shapes, and renames the tensors.

Source: spec/fastwam.md sections 1.5 and 4.1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from wam_policy.errors import WeightsError
from wam_policy.hub.foreign import key_mapping

# of the latents of Wan 2.2's codec; those of Wan 2.1's are diffusers' defaults
# fmt: off
WAN22_MEAN = [
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098,
    0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502, -0.2055, -0.0322, 0.1109, 0.1567,
    -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957,
    0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
]
WAN22_STD = [
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165,
    0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659, 0.7069, 0.5338, 0.4889, 0.4917,
    0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600,
    0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
]
# fmt: on
WAN22_CODEC: dict[
    str, Any
] = {  # how diffusers is told to build Wan 2.2's codec; Wan 2.1's is its default
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 16,
    "latents_mean": WAN22_MEAN,
    "latents_std": WAN22_STD,
}


def codec(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration of `diffusers.AutoencoderKLWan` and its tensors, from the original names.

    Raises:
        WeightsError: tensors that tell the configuration are missing, or the latents are of no released codec.
    """
    try:
        return _codec(tensors)
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise WeightsError(f"the codec's weights are incomplete: {error!r}") from error


def _codec(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    residual = "encoder.downsamples.0.downsamples.0.residual.2.weight" in tensors
    blocks = _numbers(tensors, r"encoder\.downsamples\.([\d.a-z]+)\.residual\.6\.weight")
    resamplers = _numbers(tensors, r"encoder\.downsamples\.([\d.a-z]+)\.resample\.1\.weight")
    stages = len(resamplers) + 1
    per_stage = len(blocks) // stages
    base, channels = tensors["encoder.conv1.weight"].shape[:2]
    widths = [
        tensors[f"encoder.downsamples.{block}.residual.6.weight"].shape[0]
        for block in blocks[::per_stage]
    ]
    temporal = [f"encoder.downsamples.{at}.time_conv.weight" in tensors for at in resamplers]
    latents = tensors["conv2.weight"].shape[0]
    config: dict[str, Any] = {
        "_class_name": "AutoencoderKLWan",
        "base_dim": base,
        "decoder_base_dim": tensors["decoder.conv1.weight"].shape[0] * base // widths[-1],
        "z_dim": latents,
        "dim_mult": [width // base for width in widths],
        "num_res_blocks": per_stage,
        "temperal_downsample": temporal,
        "is_residual": residual,
        "in_channels": channels,
        "out_channels": tensors["decoder.head.2.weight"].shape[0],
        "patch_size": 2 if residual else None,
        "scale_factor_spatial": (2 if residual else 1) * 2 ** (stages - 1),
        "scale_factor_temporal": 2 ** sum(temporal),
    }
    if latents == len(WAN22_MEAN):
        config |= {"latents_mean": WAN22_MEAN, "latents_std": WAN22_STD}
    elif latents != 16:
        raise WeightsError(
            f"a codec of {latents} latent channels is none of the released ones (48 and 16)"
        )
    return config, key_mapping.to_native(
        tensors, key_mapping.wan_vae(stages, per_stage, residual=residual)
    )


def _numbers(tensors: Mapping[str, Tensor], pattern: str) -> list[str]:
    """What the pattern's group matched, in the order of the numbers in it."""
    found = {m[1] for name in tensors if (m := re.fullmatch(pattern, name))}
    return sorted(found, key=lambda place: [int(n) for n in re.findall(r"\d+", place)])


def text_encoder(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration of `transformers.UMT5EncoderModel` and its tensors, from the original names.

    Raises:
        WeightsError: tensors that tell the configuration are missing.
    """
    layers = len({m[1] for name in tensors if (m := re.match(r"blocks\.(\d+)\.", name))})
    try:
        vocabulary, width = tensors["token_embedding.weight"].shape
        buckets, heads = tensors["blocks.0.pos_embedding.embedding.weight"].shape
        config = {
            "vocab_size": vocabulary,
            "d_model": width,
            "d_kv": tensors["blocks.0.attn.q.weight"].shape[0] // heads,
            "d_ff": tensors["blocks.0.ffn.fc1.weight"].shape[0],
            "num_layers": layers,
            "num_heads": heads,
            "relative_attention_num_buckets": buckets,
        }
    except KeyError as error:
        raise WeightsError(f"the text encoder's weights are incomplete: no {error}") from error
    return config, key_mapping.to_native(tensors, key_mapping.umt5(layers))
