"""Conversion of the original files of Wan's video VAE and text encoder.

Configurations are inferred from the shapes of the tensors, and the tensors are renamed to the
names of diffusers and transformers. See docs/method.md, "Encoders".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from wam_policy.errors import WeightsError
from wam_policy.hub.foreign import key_mapping

# Statistics of the latents of Wan 2.2's VAE, by channel. Those of Wan 2.1's VAE are diffusers'
# defaults.
# fmt: off
WAN22_MEAN = [
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
]
WAN22_STD = [
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
]
# fmt: on

# Entries of diffusers' configuration for Wan 2.2's VAE; its defaults are those of Wan 2.1's.
WAN22_CODEC: dict[str, Any] = {
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

# Latent channels of Wan 2.1's VAE.
_WAN21_CHANNELS = 16


def video_vae(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Convert the video VAE.

    Args:
        tensors: Weights by their original names.

    Returns:
        Configuration of `diffusers.AutoencoderKLWan`, and the weights by its names.

    Raises:
        WeightsError: Tensors that determine the configuration are missing, or the latents are not
            those of a released VAE.
    """
    try:
        return _convert_vae(tensors)
    except WeightsError:
        raise
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise WeightsError(f"the weights of the video VAE are incomplete: {error!r}") from error


def _convert_vae(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Convert the video VAE; missing tensors raise the errors of the lookups that fail."""
    # Only Wan 2.2's residual stages group their blocks: names inside a stage have two numbers.
    is_residual = "encoder.downsamples.0.downsamples.0.residual.2.weight" in tensors
    prefix = r"encoder\.downsamples\.([\d.a-z]+)"
    blocks = _matches(tensors, rf"{prefix}\.residual\.6\.weight")
    resamplers = _matches(tensors, rf"{prefix}\.resample\.1\.weight")

    # Every stage but the last ends with a resampler.
    stages = len(resamplers) + 1
    blocks_per_stage = len(blocks) // stages
    widths = [
        tensors[f"encoder.downsamples.{block}.residual.6.weight"].shape[0]
        for block in blocks[::blocks_per_stage]
    ]
    is_temporal = [
        f"encoder.downsamples.{resampler}.time_conv.weight" in tensors for resampler in resamplers
    ]

    base_dim, in_channels = tensors["encoder.conv1.weight"].shape[:2]
    decoder_width = tensors["decoder.conv1.weight"].shape[0]
    latent_channels = tensors["conv2.weight"].shape[0]
    patch_size = 2 if is_residual else None
    config: dict[str, Any] = {
        "_class_name": "AutoencoderKLWan",
        "base_dim": base_dim,
        "decoder_base_dim": decoder_width * base_dim // widths[-1],
        "z_dim": latent_channels,
        "dim_mult": [width // base_dim for width in widths],
        "num_res_blocks": blocks_per_stage,
        "temperal_downsample": is_temporal,
        "is_residual": is_residual,
        "in_channels": in_channels,
        "out_channels": tensors["decoder.head.2.weight"].shape[0],
        "patch_size": patch_size,
        "scale_factor_spatial": (patch_size or 1) * 2 ** (stages - 1),
        "scale_factor_temporal": 2 ** sum(is_temporal),
    }

    # The statistics of the latents are in no file: they are known for the released VAEs.
    if latent_channels == len(WAN22_MEAN):
        config["latents_mean"] = WAN22_MEAN
        config["latents_std"] = WAN22_STD
    elif latent_channels != _WAN21_CHANNELS:
        raise WeightsError(
            f"expected a released video VAE ({len(WAN22_MEAN)} or {_WAN21_CHANNELS} latent "
            f"channels), got {latent_channels} latent channels"
        )

    table = key_mapping.wan_vae(stages, blocks_per_stage, residual=is_residual)
    return config, key_mapping.to_native(tensors, table)


def _matches(tensors: Mapping[str, Tensor], pattern: str) -> list[str]:
    """Return what the pattern's group matches in the names, in the order of the numbers in it."""
    matches = (re.fullmatch(pattern, name) for name in tensors)
    groups = {match[1] for match in matches if match is not None}

    def numbers(group: str) -> list[int]:
        """Return the numbers in a match."""
        return [int(number) for number in re.findall(r"\d+", group)]

    return sorted(groups, key=numbers)


def text_encoder(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Convert the text encoder.

    Args:
        tensors: Weights by their original names.

    Returns:
        Fields of `transformers.UMT5Config`, and the weights by the names of `UMT5EncoderModel`.

    Raises:
        WeightsError: Tensors that determine the configuration are missing.
    """
    try:
        layers = key_mapping.count_blocks(tensors)
        vocabulary, width = tensors["token_embedding.weight"].shape
        buckets, heads = tensors["blocks.0.pos_embedding.embedding.weight"].shape
        inner_dim = tensors["blocks.0.attn.q.weight"].shape[0]
        config = {
            "vocab_size": vocabulary,
            "d_model": width,
            "d_kv": inner_dim // heads,
            "d_ff": tensors["blocks.0.ffn.fc1.weight"].shape[0],
            "num_layers": layers,
            "num_heads": heads,
            "relative_attention_num_buckets": buckets,
        }
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise WeightsError(f"the weights of the text encoder are incomplete: {error!r}") from error
    return config, key_mapping.to_native(tensors, key_mapping.umt5(layers))
