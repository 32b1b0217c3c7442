"""Reads the sizes of a Fast-WAM off its tensors' shapes. Source: spec/fastwam.md section 1.2."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from wam_policy.errors import WeightsError


def sizes(tensors: Mapping[str, Tensor], head_dim: int) -> dict[str, Any]:
    """The fields of `FastWAMConfig` that these tensors, in our names, decide.

    Args:
        tensors: of a whole policy, or of some of its parts.
        head_dim: width of an attention head, which no shape tells.

    Raises:
        WeightsError: a part lacks a tensor, or its attention isn't a whole number of heads wide.
    """
    found: dict[str, Any] = {"head_dim": head_dim}

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise WeightsError(f"the weights lack {name!r}, which tells the model's size")
        return tuple(tensors[name].shape)

    for expert, prefix in (("video", "video"), ("action", "action_expert")):
        blocks = {int(m[1]) for name in tensors if (m := re.match(rf"{expert}\.blocks\.(\d+)\.", name))}
        if not blocks:
            continue
        inner, dim = shape(f"{expert}.blocks.0.self_attn.q.weight")
        if inner % head_dim:
            raise WeightsError(f"attention {inner} wide isn't a whole number of heads {head_dim} wide: say another `head_dim`")
        found |= {
            "layers": max(blocks) + 1,
            "heads": inner // head_dim,
            f"{prefix}_dim": dim,
            f"{prefix}_ffn_dim": shape(f"{expert}.blocks.0.ffn.0.weight")[0],
            "text_dim": shape(f"{expert}.text_embedding.0.weight")[1],
            "freq_dim": shape(f"{expert}.time_embedding.0.weight")[1],
        }
    if "video.patch_embedding.weight" in tensors:
        _, found["latent_channels"], *patch = shape("video.patch_embedding.weight")
        found["patch_size"] = tuple(patch)
    if "action.action_encoder.weight" in tensors:
        found["action_dim"] = shape("action.action_encoder.weight")[1]
        found["proprio_dim"] = shape("proprio_encoder.weight")[1] if "proprio_encoder.weight" in tensors else None
    return found
