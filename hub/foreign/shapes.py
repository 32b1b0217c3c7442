"""Reads the sizes of a model off its tensors' shapes. Sources: spec/fastwam.md section 1.2, spec/lightwam.md section 2."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from wam_policy.errors import WeightsError
from wam_policy.models.config import LORA_TARGETS


def infer_config(tensors: Mapping[str, Tensor], head_dim: int) -> dict[str, Any]:
    """The fields of `FastWAMConfig` that these tensors, in our names, decide.

    Args:
        tensors: of a whole policy, or of some of its parts.
        head_dim: width of an attention head, which no shape tells.

    Raises:
        WeightsError: a part lacks a tensor, or its attention isn't a whole number of heads wide.
    """
    found: dict[str, Any] = {"head_dim": head_dim}
    shape = functools.partial(_shape, tensors)
    for expert, prefix in (("video", "video"), ("action", "action_expert")):
        blocks = {
            int(m[1]) for name in tensors if (m := re.match(rf"{expert}\.blocks\.(\d+)\.", name))
        }
        if not blocks:
            continue
        inner, dim = shape(f"{expert}.blocks.0.self_attn.q.weight")
        if inner % head_dim:
            raise WeightsError(
                f"attention {inner} wide isn't a whole number of heads {head_dim} wide: say another `head_dim`"
            )
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
        found["proprio_dim"] = (
            shape("proprio_encoder.weight")[1] if "proprio_encoder.weight" in tensors else None
        )
    return found


def infer_light_config(tensors: Mapping[str, Tensor], head_dim: int) -> dict[str, Any]:
    """The fields of `LightWAMConfig` that these tensors, in our names, decide; `features` only where queries pool them.

    Raises:
        WeightsError: as `sizes`.
    """
    found, shape = infer_config(tensors, head_dim), functools.partial(_shape, tensors)

    def numbers(pattern: str) -> tuple[int, ...]:
        return tuple(sorted({int(m[1]) for name in tensors if (m := re.match(pattern, name))}))

    taps = numbers(r"adapters\.(\d+)\.")
    if not taps:
        raise WeightsError("the weights hold no adapters: a Light-WAM acts on what they record")
    lora = {
        m[1]
        for name in tensors
        if (m := re.match(r"video\.blocks\.\d+\.(.+)\.lora_down\.weight", name))
    }
    layers = numbers(r"video\.blocks\.(\d+)\..+\.lora_down\.weight")
    found |= {
        "taps": taps,
        "adapter_dim": shape(f"adapters.{taps[0]}.down_proj.weight")[0],
        "lora_rank": 0,
        "lora_layers": None if len(layers) in (0, found["layers"]) else layers,
        "layer_dim": shape("expert.layer_compressors.0.fc1.weight")[0],
        "trunk_dim": shape("expert.fused_proj.weight")[0],
        "trunk_blocks": len(numbers(r"expert\.trunk\.(\d+)\.")),
        "step_dim": shape("expert.step_pos_proj.0.weight")[0],
        "action_dim": shape("expert.output.2.weight")[0],
        "proprio_dim": shape("proprio_encoder.weight")[1]
        if "proprio_encoder.weight" in tensors
        else None,
    }
    if layers:
        ranks = {x.shape[0] for name, x in tensors.items() if name.endswith(".lora_down.weight")}
        if len(ranks) > 1:
            raise WeightsError(f"LoRA of several ranks in one file: {sorted(ranks)}")
        found |= {
            "lora_rank": ranks.pop(),
            "lora_targets": tuple(target for target in LORA_TARGETS if target in lora),
        }
    poolers = [
        m.groups()
        for name in tensors
        if (m := re.match(r"expert\.layer_poolers\.(\d+)\.(\w+)\.query_tokens", name))
    ]
    found["pooling"] = "learned_query" if poolers else "mean"
    if poolers:
        found["features"] = tuple(
            tuple(source for i, source in poolers if int(i) == tap) for tap in range(len(taps))
        )
        first = f"expert.layer_poolers.0.{found['features'][0][0]}."
        found["queries"] = shape(f"{first}query_tokens")[0]
        if f"{first}query_slot_merge_logits" in tensors:
            found["merge_slots"] = shape(f"{first}query_slot_merge_logits")[0]
            found["merge_dim"] = shape(f"{first}query_merge_projector.1.weight")[0]
    return found


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """The shape of a tensor that must be there."""
    if name not in tensors:
        raise WeightsError(f"the weights lack {name!r}, which tells the model's size")
    return tuple(tensors[name].shape)
