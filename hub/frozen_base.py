"""Slim checkpoints: they hold what was trained, and name the frozen weights they belong to by place and hash."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from wam_policy.config import Base, DtypeName, Source
from wam_policy.errors import ConfigError, WeightsError
from wam_policy.hub import components, weights
from wam_policy.hub.download import DownloadOptions
from wam_policy.hub.foreign import identify

SHORT: tuple[DtypeName, ...] = ("bfloat16", "float16")


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over tensors in the order of their names: each one's name, dtype, shape and bytes."""
    total = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        total.update(f"{name} {str(x.dtype).removeprefix('torch.')} {list(x.shape)}\n".encode())
        total.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def make_base(
    held: Mapping[str, Tensor], source: Source, dtype: torch.dtype | None, folder: Path
) -> Base:
    """What a slim checkpoint says about a policy's frozen weights, compared with those at their place.

    They are hashed in the shortest dtype that holds them exactly: weights that were once stored in it are recognised again,
    whatever they are computed in.

    Args:
        held: the policy's frozen weights.
        source: where they can be had.
        dtype: what the policy's weights are stored in; None: what they are.
        folder: where the checkpoint is to be.

    Raises:
        CheckpointError: there is nothing at that place.
        WeightsError: there are others.
    """
    stored = {name: x if dtype is None else x.to(dtype) for name, x in held.items()}
    own = str(next(iter(stored.values())).dtype).removeprefix("torch.")
    exact = (
        name
        for name in SHORT
        if all(torch.equal(x.to(getattr(torch, name)).to(x.dtype), x) for x in stored.values())
    )
    name: DtypeName = next(exact, own)  # type: ignore[arg-type]  # `Base` checks it
    base = Base(
        source=source,
        dtype=name,
        sha256=digest({n: x.to(getattr(torch, name)) for n, x in stored.items()}),
    )
    read_base_weights(base, held, folder, DownloadOptions())
    return base


def refuse_own(source: Source, folder: Path) -> None:
    """Refuse a base that the checkpoint itself would overwrite.

    Raises:
        ConfigError: it is in the checkpoint's folder.
    """
    if (
        source.repo is None
        or (Path(source.repo).expanduser() / source.subfolder).resolve() == folder.resolve()
    ):
        raise ConfigError(
            "a slim checkpoint's base must be another folder or repository: it would overwrite it"
        )


def matches_base(base: Base, held: Mapping[str, Tensor]) -> bool:
    """Whether a policy's frozen weights are, to the bit, those of a base."""
    return (
        digest({name: x.to(getattr(torch, base.dtype)) for name, x in held.items()}) == base.sha256
    )


def refuse_unpublished(base: Base, repo_id: str) -> None:
    """Refuse, for a checkpoint that goes to the Hub, a base that nobody else has or that the upload would replace.

    Raises:
        ConfigError: it is a folder of this machine, or the repository itself.
    """
    repo = base.source.repo or ""
    if Path(repo).expanduser().exists() or repo.count("/") != 1 or repo.startswith((".", "~")):
        raise ConfigError(
            f"the base {repo!r} is a folder of this machine: upload it too, and name its Hub id"
        )
    if repo == repo_id:
        raise ConfigError(
            f"a slim checkpoint's base must be another repository: the upload would replace {repo_id!r}"
        )


def read_base_weights(
    base: Base, expected: Mapping[str, Tensor], folder: Path, download: DownloadOptions
) -> dict[str, Tensor]:
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
    place = components.component_folder(base.source, folder, download)
    ours = any(place.glob("model*.safetensors"))
    there = weights.read_weights(place) if ours else identify.read_foreign_file(place).tensors
    found = {name: x for name, x in there.items() if name in expected}
    weights.check_fit(found, expected, f"the base {place}")
    found = {name: x.to(getattr(torch, base.dtype)) for name, x in found.items()}
    if (seen := digest(found)) != base.sha256:
        raise WeightsError(
            f"the video expert in {place} isn't the one this checkpoint was trained on: its hash is {seen[:16]}…, "
            f"{base.sha256[:16]}… is wanted; take the base and the revision that the checkpoint's card names"
        )
    return found
