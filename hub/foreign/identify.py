"""Identification of foreign checkpoints by their tensors' names, and renaming to native names.

See docs/method.md, "Checkpoint formats".
"""

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

# Group of tensors that only a Light-WAM has.
LIGHT = "state_fusion_action_expert"

Kind = Literal["policy", "part", "video VAE", "text encoder"]

# Tensors without which a policy cannot act.
NEEDED = ("video.patch_embedding.weight", "action.action_encoder.weight", "action.head.weight")

# Groups of tensors in files of the reference implementations.
GROUPS = {LIGHT, "mot", "dit", "backbone_state_dict"}

# Dictionaries that trainers put around the weights, beside counters and the optimizer's state.
WRAPPERS = ("model_state", "state_dict", "model_state_dict", "model", "module")

# Stem of the files in a folder of raw Wan weights.
RAW_STEM = "diffusion_pytorch_model"


@dataclass(frozen=True)
class ForeignCheckpoint:
    """Content of another project's checkpoint."""

    kind: Kind

    # Names are this package's for a policy or a part of one, the original ones for a video VAE or
    # text encoder, which `hub.foreign.wan` converts.
    tensors: dict[str, Tensor]

    # Description of the source's format, for the card.
    layout: str

    # Family of a policy.
    family: Family = "fast_wam"

    # Width of an attention head; None where the file does not record it.
    head_dim: int | None = None


def read_foreign_file(path: Path) -> ForeignCheckpoint:
    """Read a file of another project, or a folder of raw Wan weights.

    Args:
        path: File (`.pt`, `.pth`, `.safetensors`), or folder of safetensors shards.

    Returns:
        Its content; tensors are memory-mapped where possible.

    Raises:
        WeightsError: It cannot be read, or its format is unknown.
    """
    if path.is_dir():
        return identify(weights.read_weights(path, RAW_STEM), path)
    if path.suffix == ".safetensors":
        return identify(weights.read_weights_file(path), path)
    return identify(pickles.read_pickle(path), path)


def identify(payload: Any, path: Path) -> ForeignCheckpoint:
    """Identify the content of a file.

    Args:
        payload: Content of the file: tensors by name, or groups of them by key.
        path: Path of the file, for the error message.

    Returns:
        The checkpoint; tensors of a policy or part have native names.

    Raises:
        WeightsError: The format is unknown.
    """
    if not isinstance(payload, Mapping):
        raise WeightsError(f"{path}: expected weights by name, got a {type(payload).__name__}")
    payload = _unwrapped(payload, path)
    payload = _clean_names(payload, path)

    # Groups of tensors: files of the reference implementations.
    if LIGHT in payload and ("mot" in payload or "dit" in payload):
        return _light_wam(payload)
    if "mot" in payload:
        tensors = _join_groups(payload, ("mot", "proprio_encoder"))
        return _policy_or_part(tensors, "upstream `.pt`", path)
    if "dit" in payload:
        tensors = key_mapping.to_native(_group(payload, "dit"), key_mapping.WAN_DIT)
        return _part(tensors, "upstream `.pt` of a video expert", path)
    if "backbone_state_dict" in payload:
        return _action_backbone(payload, path)

    # Tensors by name: Wan's files, LeRobot's policies, dumps of a training.
    tensors = _only_tensors(payload, path)
    component = _wan_component(tensors, path)
    if component is not None:
        return component
    is_layer_by_layer = any(".layers.0.blocks." in name for name in tensors)
    layout = "LeRobot's layer by layer" if is_layer_by_layer else "upstream's names"
    return _policy_or_part(tensors, layout, path)


def _unwrapped(payload: Mapping[Any, Any], path: Path) -> Mapping[Any, Any]:
    """Return the weights inside the dictionaries that trainers put around them."""
    while not GROUPS & set(payload):
        wrapper = next((name for name in WRAPPERS if name in payload), None)
        if wrapper is None:
            return payload
        content = payload[wrapper]
        if isinstance(content, Tensor):
            return payload
        if not isinstance(content, Mapping):
            raise WeightsError(
                f"{path}: expected weights by name in {wrapper!r}, got a {type(content).__name__}"
            )
        payload = content
    return payload


def _clean_names(payload: Mapping[Any, Any], path: Path) -> dict[Any, Any]:
    """Return the weights without the names of wrapped modules, in groups as well."""
    cleaned: dict[Any, Any] = {}
    for name, value in payload.items():
        if isinstance(value, Mapping):
            value = _clean_names(value, path)
        elif isinstance(value, Tensor):
            value = pickles.check_plain(str(name), value, path)
        key = key_mapping.strip_modules(name) if isinstance(name, str) else name
        if key in cleaned and not key_mapping.is_equal(cleaned[key], value):
            raise WeightsError(
                f"{path} holds {key!r} twice, with different values; the other name is {name!r}"
            )
        cleaned[key] = value
    return cleaned


def _join_groups(payload: Mapping[str, Any], groups: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the tensors of some groups by "group.name"; absent groups are skipped."""
    tensors = {}
    for group in groups:
        for name, tensor in _group(payload, group).items():
            tensors[f"{group}.{name}"] = tensor
    return tensors


def _group(payload: Mapping[str, Any], group: str) -> dict[str, Tensor]:
    """Return the tensors of a group by name; none if the group is absent."""
    content = payload.get(group) or {}
    is_group = isinstance(content, Mapping)
    if not is_group or not all(
        isinstance(name, str) and isinstance(x, Tensor) for name, x in content.items()
    ):
        raise WeightsError(f"expected tensors by name in {group!r}, got {content!r:.100}")
    return dict(content)


def _light_wam(payload: Mapping[str, Any]) -> ForeignCheckpoint:
    """Return the policy in a file of the Light-WAM repository."""
    # Old files hold the video expert alone, without the mixture around it.
    if "dit" in payload:
        video = _group(payload, "dit")
        mixture = {f"mixtures.video.{name}": x for name, x in video.items()}
        payload = {**payload, "mot": mixture}

    tensors = _join_groups(payload, ("mot", LIGHT, "proprio_encoder"))
    table = key_mapping.light_wam(key_mapping.count_blocks(tensors))
    native = key_mapping.to_native(tensors, table)
    return ForeignCheckpoint("policy", native, "upstream `.pt`", "light_wam")


def _action_backbone(payload: Mapping[str, Any], path: Path) -> ForeignCheckpoint:
    """Return the part in Fast-WAM's file of an action expert."""
    table = key_mapping.ACTION_BACKBONE
    tensors = key_mapping.to_native(_group(payload, "backbone_state_dict"), table)
    part = _part(tensors, "upstream's action expert backbone", path)
    meta = payload.get("meta")
    head_dim = meta.get("attn_head_dim") if isinstance(meta, Mapping) else None
    return replace(part, head_dim=head_dim)


def _wan_component(tensors: Mapping[str, Tensor], path: Path) -> ForeignCheckpoint | None:
    """Return the video VAE, text encoder or DiT in a file of Wan's; None for other files."""
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    if "encoder.conv1.weight" in bare and "decoder.conv1.weight" in bare:
        return ForeignCheckpoint("video VAE", bare, "original Wan VAE")
    if "token_embedding.weight" in bare and "blocks.0.attn.q.weight" in bare:
        return ForeignCheckpoint("text encoder", bare, "original UMT5 encoder")
    if "patch_embedding.weight" not in bare:
        return None

    if "blocks.0.self_attn.q.weight" in bare:
        native = key_mapping.to_native(bare, key_mapping.WAN_DIT)
        return _part(native, "raw Wan DiT", path)
    if "blocks.0.attn1.to_q.weight" in bare:
        table = key_mapping.wan_diffusers(key_mapping.count_blocks(bare))
        native = key_mapping.to_native(bare, table)
        return _part(native, "raw Wan DiT in diffusers' names", path)
    return None


def _only_tensors(payload: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Return the payload, after checking that it holds tensors only."""
    only_tensors = all(
        isinstance(name, str) and isinstance(x, Tensor) for name, x in payload.items()
    )
    if not only_tensors or not payload:
        raise WeightsError(
            f"{path} holds none of the layouts this package knows; "
            f"its entries are {sorted(map(str, payload))[:8]}"
        )
    return dict(payload)


def _policy_or_part(tensors: Mapping[str, Tensor], layout: str, path: Path) -> ForeignCheckpoint:
    """Return a Fast-WAM, or the parts of one that are present.

    Args:
        tensors: Tensors by foreign name.
        layout: Description of the source's format.
        path: Path of the file, for the error message.

    Raises:
        WeightsError: There is neither a video nor an action expert.
    """
    native = key_mapping.policy_to_native(tensors)
    if not any(name.startswith(("video.blocks.0.", "action.blocks.0.")) for name in native):
        raise WeightsError(
            f"{path} holds none of the models this package knows; "
            f"its tensors begin with {sorted(tensors)[:5]}"
        )
    if not set(NEEDED) <= set(native):
        return _part(native, f"{layout}, partial", path)
    return ForeignCheckpoint("policy", native, layout)


def _part(tensors: dict[str, Tensor], layout: str, path: Path) -> ForeignCheckpoint:
    """Return a part of a policy, after checking that its tensors have one dtype."""
    weights.check_dtype(tensors, str(path))
    return ForeignCheckpoint("part", tensors, layout)
