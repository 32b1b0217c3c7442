"""Slim checkpoints: they hold what was trained, and name the frozen weights they belong to by place and hash."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from wam_policy.config import Base, PolicyConfig, Source
from wam_policy.errors import ConfigError, WeightsError
from wam_policy.hub import foreign, frozen, weights
from wam_policy.hub.locate import Download
from wam_policy.models.light_wam import trained


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over tensors in the order of their names: each one's name, dtype, shape and bytes."""
    total = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        total.update(f"{name} {str(x.dtype).removeprefix('torch.')} {list(x.shape)}\n".encode())
        total.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def base_of(config: PolicyConfig, tensors: Mapping[str, Tensor], source: Source | None, dtype: torch.dtype | None) -> Base:
    """What a slim checkpoint says about the frozen ones of a policy's `tensors`.

    Args:
        config: the policy's contract.
        tensors: its weights.
        source: where the frozen ones can be had; None: where the policy has them from.
        dtype: what they are cast to before they are hashed; None: what they are.

    Raises:
        ConfigError: nobody says where they can be had.
    """
    if source is None and config.base is None:
        raise ConfigError("a slim checkpoint names its frozen weights: say where they are, `base=Source(repo=…)`")
    held = {name: x if dtype is None else x.to(dtype) for name, x in tensors.items() if not trained(name)}
    stored = next(iter(held.values())).dtype
    where = source if source is not None or config.base is None else config.base.source
    assert where is not None
    return Base(source=where, dtype=str(stored).removeprefix("torch."), sha256=digest(held))  # type: ignore[arg-type]  # checked by it


def frozen_weights(base: Base, expected: Mapping[str, Tensor], folder: Path, download: Download) -> dict[str, Tensor]:
    """The weights a slim checkpoint leaves out.

    Args:
        base: what it says about them.
        expected: their names and shapes.
        folder: of the checkpoint.
        download: how they are fetched.

    Raises:
        CheckpointError: they can't be found.
        WeightsError: they are not the ones the checkpoint was trained on.
    """
    place = frozen.folder(base.source, folder, download)
    ours = any(place.glob("model*.safetensors"))
    there = weights.read(place) if ours else foreign.read(place).tensors
    found = {name: x for name, x in there.items() if name in expected}
    weights.fit(found, expected, f"the base {place}")
    found = {name: x.to(getattr(torch, base.dtype)) for name, x in found.items()}
    if (seen := digest(found)) != base.sha256:
        raise WeightsError(
            f"the video expert in {place} isn't the one this checkpoint was trained on: its hash is {seen[:16]}…, "
            f"{base.sha256[:16]}… is wanted; take the revision of the base that the checkpoint's card names"
        )
    return found
