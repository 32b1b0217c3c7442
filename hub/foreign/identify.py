"""Tells by its tensors' names what a file of another project holds, and renames them to ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from wam_policy.config import Family
from wam_policy.errors import WeightsError
from wam_policy.hub import weights
from wam_policy.hub.foreign import key_mapping, pickles

LIGHT = "state_fusion_action_expert"  # the group of tensors that only a Light-WAM has
Kind = Literal["policy", "part", "codec", "text encoder"]
NEEDED = (
    "video.patch_embedding.weight",
    "action.action_encoder.weight",
    "action.head.weight",
)  # what a policy can't act without
RAW_STEM = "diffusion_pytorch_model"  # a raw Wan DiT in a folder


@dataclass(frozen=True)
class ForeignCheckpoint:
    """Tensors of another project, in our names."""

    kind: Kind
    tensors: dict[
        str, Tensor
    ]  # a policy's or a part of one, ours; a codec's, diffusers'; a text encoder's, transformers'
    layout: str  # what it was, for the card
    family: Family = "fast_wam"  # of a policy
    head_dim: int | None = None  # width of an attention head, where the file says it


def read_foreign_file(path: Path) -> ForeignCheckpoint:
    """What a file (`.pt`, `.pth`, `.safetensors`), or a folder of raw Wan shards, holds; mapped, not yet read.

    Raises:
        WeightsError: it can't be read, or it is nothing this package knows.
    """
    if path.is_dir():
        return identify(weights.read_weights(path, RAW_STEM), path)
    if path.suffix == ".safetensors":
        return identify(weights.read_weights_file(path), path)
    return identify(pickles.read_pickle(path), path)


def identify(payload: Any, path: Path) -> ForeignCheckpoint:
    """Recognise what was read from `path`."""
    if not isinstance(payload, Mapping):
        raise WeightsError(f"{path} holds a {type(payload).__name__}, not weights by name")
    for wrapper in ("model_state", "state_dict"):
        payload = payload.get(wrapper, payload)
    if LIGHT in payload and "dit" in payload:  # an old file of a Light-WAM
        payload = {
            **payload,
            "mot": {f"mixtures.video.{name}": x for name, x in payload["dit"].items()},
        }
    if "mot" in payload:
        groups = ("mot", LIGHT, "proprio_encoder")
        named = {
            f"{group}.{name}": x
            for group in groups
            for name, x in (payload.get(group) or {}).items()
        }
        if LIGHT in payload:
            return ForeignCheckpoint(
                "policy",
                key_mapping.to_native(named, key_mapping.light_wam(key_mapping.blocks(named))),
                "upstream `.pt`",
                "light_wam",
            )
        return _policy(named, "upstream `.pt`", path)
    if "dit" in payload:
        return _part(
            key_mapping.to_native(payload["dit"], key_mapping.WAN_DIT),
            "upstream `.pt` of a video expert",
            path,
        )
    if "backbone_state_dict" in payload:
        named = key_mapping.to_native(payload["backbone_state_dict"], key_mapping.ACTION_BACKBONE)
        part, meta = _part(named, "upstream's action expert backbone", path), payload.get("meta")
        return replace(
            part, head_dim=meta.get("attn_head_dim") if isinstance(meta, Mapping) else None
        )
    tensors = _only_tensors(payload, path)
    bare = {name.removeprefix("model."): x for name, x in tensors.items()}
    if "encoder.conv1.weight" in bare and "decoder.conv1.weight" in bare:
        return ForeignCheckpoint("codec", bare, "original Wan codec")
    if "token_embedding.weight" in bare and "blocks.0.attn.q.weight" in bare:
        return ForeignCheckpoint("text encoder", bare, "original UMT5 encoder")
    if "patch_embedding.weight" in bare and "blocks.0.self_attn.q.weight" in bare:
        return _part(key_mapping.to_native(bare, key_mapping.WAN_DIT), "raw Wan DiT", path)
    if "patch_embedding.weight" in bare and "blocks.0.attn1.to_q.weight" in bare:
        named = key_mapping.to_native(bare, key_mapping.wan_diffusers(key_mapping.blocks(bare)))
        return _part(named, "raw Wan DiT in diffusers' names", path)
    layer_by_layer = any(".layers.0.blocks." in name for name in tensors)
    return _policy(
        tensors, "LeRobot's layer by layer" if layer_by_layer else "upstream's names", path
    )


def _only_tensors(payload: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    others = [name for name, x in payload.items() if not isinstance(x, Tensor)]
    if others or not payload:
        raise WeightsError(
            f"{path} holds none of the layouts this package knows; its entries are {sorted(payload)[:8]}"
        )
    return dict(payload)


def _policy(tensors: Mapping[str, Tensor], layout: str, path: Path) -> ForeignCheckpoint:
    ours = key_mapping.policy_to_native(tensors)
    if not any(name.startswith(("video.blocks.0.", "action.blocks.0.")) for name in ours):
        raise WeightsError(
            f"{path} holds none of the models this package knows; its tensors begin with {sorted(tensors)[:5]}"
        )
    if not set(NEEDED) <= set(ours):
        return _part(ours, f"{layout}, partial", path)
    return ForeignCheckpoint("policy", ours, layout)


def _part(tensors: dict[str, Tensor], layout: str, path: Path) -> ForeignCheckpoint:
    weights.check_dtype(tensors, str(path))
    return ForeignCheckpoint("part", tensors, layout)
