"""Inference of a model's sizes from the shapes of its tensors.

See docs/method.md, "Checkpoint formats".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from wam_policy.errors import WeightsError
from wam_policy.hub.foreign.key_mapping import count_blocks
from wam_policy.models.config import LORA_TARGETS

# Digits of the largest index of a part that any weights hold.
_MAX_DIGITS = 4

# Prefixes of the experts' tensors, and of the experts' fields in `FastWAMConfig`.
_EXPERTS = {"video": "video", "action": "action_expert"}


def infer_config(tensors: Mapping[str, Tensor], head_dim: int) -> dict[str, Any]:
    """Infer the fields of `FastWAMConfig` that tensors determine.

    Args:
        tensors: Weights of a policy or of some of its parts, by this package's names.
        head_dim: Width of an attention head, which no shape determines.

    Returns:
        Values by field.

    Raises:
        WeightsError: A part lacks a tensor, or its attention width is not a multiple of
            `head_dim`.
    """
    fields: dict[str, Any] = {"head_dim": head_dim}
    for expert, prefix in _EXPERTS.items():
        fields |= _infer_expert(tensors, expert, prefix, head_dim)

    if "video.patch_embedding.weight" in tensors:
        _, channels, *patch_size = _shape(tensors, "video.patch_embedding.weight")
        fields["latent_channels"] = channels
        fields["patch_size"] = tuple(patch_size)

    if "action.action_encoder.weight" in tensors:
        fields["action_dim"] = _shape(tensors, "action.action_encoder.weight")[1]
        fields["proprio_dim"] = _proprio_dim(tensors)
    return fields


def _infer_expert(
    tensors: Mapping[str, Tensor], expert: str, prefix: str, head_dim: int
) -> dict[str, Any]:
    """Infer the fields that an expert's tensors determine; none if it has no blocks."""
    blocks = count_blocks(tensors, rf"{expert}\.blocks\.(\d+)\.")
    if not blocks:
        return {}

    inner_dim, dim = _shape(tensors, f"{expert}.blocks.0.self_attn.q.weight")
    if head_dim < 1 or inner_dim % head_dim:
        raise WeightsError(
            f"the attention width {inner_dim} is not a multiple of the head width {head_dim}: "
            f"pass another `head_dim`"
        )
    return {
        "layers": blocks,
        "heads": inner_dim // head_dim,
        f"{prefix}_dim": dim,
        f"{prefix}_ffn_dim": _shape(tensors, f"{expert}.blocks.0.ffn.0.weight")[0],
        "text_dim": _shape(tensors, f"{expert}.text_embedding.0.weight")[1],
        "freq_dim": _shape(tensors, f"{expert}.time_embedding.0.weight")[1],
    }


def infer_light_config(tensors: Mapping[str, Tensor], head_dim: int) -> dict[str, Any]:
    """Infer the fields of `LightWAMConfig` that tensors determine.

    The field `features` is only determined where learned queries pool the features.

    Args:
        tensors: Weights of a policy by this package's names.
        head_dim: Width of an attention head, which no shape determines.

    Returns:
        Values by field.

    Raises:
        WeightsError: A tensor is missing, LoRA has several ranks, or the attention width is not a
            multiple of `head_dim`.
    """
    fields = infer_config(tensors, head_dim)
    taps = _numbers(tensors, r"adapters\.(\d+)\.")
    if not taps:
        raise WeightsError("the weights hold no adapters, on whose features a Light-WAM acts")
    if "layers" not in fields:
        raise WeightsError(
            "the weights hold no video expert: the file is partial; use the complete file"
        )

    # Adapters and action head.
    fields |= {
        "taps": taps,
        "adapter_dim": _shape(tensors, f"adapters.{taps[0]}.down_proj.weight")[0],
        "layer_dim": _shape(tensors, "expert.layer_compressors.0.fc1.weight")[0],
        "trunk_dim": _shape(tensors, "expert.fused_proj.weight")[0],
        "trunk_blocks": len(_numbers(tensors, r"expert\.trunk\.(\d+)\.")),
        "step_dim": _shape(tensors, "expert.step_pos_proj.0.weight")[0],
        "action_dim": _shape(tensors, "expert.output.2.weight")[0],
        "proprio_dim": _proprio_dim(tensors),
    }
    fields |= _infer_lora(tensors, fields["layers"])
    fields |= _infer_pooling(tensors, len(taps))
    return fields


def _infer_lora(tensors: Mapping[str, Tensor], layers: int) -> dict[str, Any]:
    """Infer rank, layers and targets of LoRA in a video expert of so many layers."""
    lora_layers = _numbers(tensors, r"video\.blocks\.(\d+)\..+\.lora_down\.weight")
    if not lora_layers:
        return {"lora_rank": 0, "lora_layers": None}

    ranks = {x.shape[0] for name, x in tensors.items() if name.endswith(".lora_down.weight")}
    if len(ranks) > 1:
        raise WeightsError(f"LoRA must have one rank, got {sorted(ranks)}")

    # None stands for all layers.
    on_all_layers = len(lora_layers) == layers
    targets = _matches(tensors, r"video\.blocks\.\d+\.(.+)\.lora_down\.weight")
    return {
        "lora_rank": ranks.pop(),
        "lora_layers": None if on_all_layers else lora_layers,
        "lora_targets": tuple(target for target in LORA_TARGETS if target in targets),
    }


def _infer_pooling(tensors: Mapping[str, Tensor], taps: int) -> dict[str, Any]:
    """Infer how the action head pools the features of so many taps."""
    # Learned queries have a pooler for each feature of each tap.
    features: list[list[str]] = [[] for _ in range(taps)]
    has_queries = False
    for name in tensors:
        match = re.match(r"expert\.layer_poolers\.(\d+)\.(\w+)\.query_tokens", name)
        if match is not None:
            has_queries = True
            tap = int(match[1])
            if tap < taps:
                features[tap].append(match[2])
    if not has_queries:
        return {"pooling": "mean"}

    if not all(features):
        raise WeightsError(
            f"the weights hold no query pooler for one of the {taps} taps: the file is partial; "
            f"use the complete file"
        )
    first = f"expert.layer_poolers.0.{features[0][0]}."
    fields: dict[str, Any] = {
        "pooling": "learned_query",
        "features": tuple(tuple(names) for names in features),
        "queries": _shape(tensors, f"{first}query_tokens")[0],
    }
    if f"{first}query_slot_merge_logits" in tensors:
        fields["merge_slots"] = _shape(tensors, f"{first}query_slot_merge_logits")[0]
        fields["merge_dim"] = _shape(tensors, f"{first}query_merge_projector.1.weight")[0]
    return fields


def _proprio_dim(tensors: Mapping[str, Tensor]) -> int | None:
    """Return the length of the state vector; None for weights without a proprio encoder."""
    if "proprio_encoder.weight" not in tensors:
        return None
    return _shape(tensors, "proprio_encoder.weight")[1]


def _matches(names: Iterable[str], pattern: str) -> set[str]:
    """Return what the pattern's first group matches at the beginning of any name."""
    matches = (re.match(pattern, name) for name in names)
    return {match[1] for match in matches if match is not None}


def _numbers(names: Iterable[str], pattern: str) -> tuple[int, ...]:
    """Return the distinct numbers that the pattern's first group matches, in ascending order."""
    matches = _matches(names, pattern)
    if any(len(number) > _MAX_DIGITS for number in matches):
        raise WeightsError(f"the weights number their parts up to {max(matches, key=len):.20}")
    return tuple(sorted(int(number) for number in matches))


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """Return the shape of a tensor that must be present."""
    if name not in tensors:
        raise WeightsError(f"the weights lack {name!r}, which determines a size of the model")
    return tuple(tensors[name].shape)
