"""`wam info`: what a checkpoint is and what it needs to run, without loading its weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tyro.conf import Positional

from wam_policy.config import PolicyConfig, Source
from wam_policy.errors import CheckpointError
from wam_policy.hub import checkpoint, components, load, request, weights
from wam_policy.hub.card import contract_rows
from wam_policy.hub.download import DownloadOptions, resolve_folder
from wam_policy.hub.foreign import contracts, lerobot
from wam_policy.models.encoders.vae import build_vae


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """What a checkpoint is: its contract, its size, what it needs to run."""

    src: Positional[str]
    """Folder, file or Hub id."""
    filename: str | None = None
    """The file, in a folder or Hub repository of several."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""


def info(config: InfoConfig, console: Console | None = None) -> dict[str, str]:
    """Print and return what a checkpoint is. Of a Hub repository of our own format only the small files are downloaded.

    Raises:
        CheckpointError: there is none, or it can't be read.
        ConfigError: its contract can't be right.
    """
    download = DownloadOptions(revision=config.revision)
    rows = _rows(request.CheckpointRequest(config.src, config.filename), download)
    table = Table(show_header=False)
    for key, value in rows.items():
        table.add_row(key, value)
    (console or Console()).print(table)
    return rows


def _rows(wanted: request.CheckpointRequest, download: DownloadOptions) -> dict[str, str]:
    if wanted.filename is None and not Path(wanted.source).expanduser().is_file():
        folder = resolve_folder(wanted.source, download, ["*.json", "*.md"])
        if checkpoint.is_native(folder):
            return _parts(folder) if (folder / checkpoint.BASE).is_file() else _ours(folder)
        if (folder / checkpoint.CONFIG).is_file():
            lerobot.is_lerobot(folder)  # refuses other policies before their weights are fetched
    path = wanted.locate(download)
    found = load.read_foreign(path)
    rows = {
        "Format": f"{found.layout} ({path.name}): {found.kind}",
        "Parameters": _per_part(found.tensors),
    }
    if found.kind != "policy":
        return rows | {"To use it": f"wam convert {path} FOLDER"}
    if not contracts.release_is_known(found, path, wanted):
        unknown = (
            "unknown: the file doesn't say what it was trained for (wam convert --preset … does)"
        )
        return rows | {"Stored in": _stored(found.tensors), "Contract": unknown}
    contract, origin = contracts.foreign_config(found, path, wanted)
    said = {f"From: {name}": where for name, where in origin.items()}
    return rows | _contract(contract, path.parent, {}) | said


def _ours(folder: Path) -> dict[str, str]:
    contract = checkpoint.read_config(folder)
    prompts = folder / f"{checkpoint.PROMPTS}.safetensors"
    rows = {
        "Format": f"wam-policy, version {contract.format_version}",
        "Parameters": _per_part(checkpoint.empty_model(contract).state_dict()),
    }
    return rows | _contract(
        contract, folder, weights.read_weights_file(prompts) if prompts.is_file() else {}
    )


def _parts(folder: Path) -> dict[str, str]:
    sizes = json.loads((folder / checkpoint.BASE).read_text(encoding="utf-8"))["sizes"]
    told = ", ".join(f"{name} {size}" for name, size in sizes.items())
    return {
        "Format": "wam-policy, parts to train from",
        "Sizes": told,
        "To use it": f"wam train --pretrained-path {folder}",
    }


def _contract(
    contract: PolicyConfig, folder: Path, prompts: Mapping[str, Tensor]
) -> dict[str, str]:
    """The contract, and what it takes to run it."""
    dtype = getattr(torch, contract.dtype)
    model = (
        sum(x.numel() for x in checkpoint.empty_model(contract).state_dict().values())
        * dtype.itemsize
    )
    needs = [f"{_size(model)} for the weights in {contract.dtype}"]
    codec = _codec(contract.vae, folder)
    if codec is not None:
        encoder, decoder = (_size(parameters * dtype.itemsize) for parameters in codec)
        more = "" if contract.form == "lean" else f", {decoder} more to imagine"
        needs.append(f"{encoder} for the codec's encoder{more}")
    known = f"{len(prompts)} prompts known" if prompts else "no prompt known"
    text = "none: only known prompts" if contract.text is None else _place(contract.text)
    return {
        **contract_rows(contract),
        "Precision": contract.precision,
        "Codec": _place(contract.vae),
        "Text encoder": f"{text}; {known}",
        "To run": "; ".join(needs),
    }


def _place(source: Source) -> str:
    return (
        f"{source.repo or 'this checkpoint'}{f', {source.subfolder}/' if source.subfolder else ''}"
    )


def _codec(source: Source, folder: Path) -> tuple[int, int] | None:
    """Parameters of a codec's encoder and decoder, where its configuration is here."""
    path = folder / source.subfolder / checkpoint.CONFIG
    if source.repo is not None or not path.is_file():
        return None
    try:
        with torch.device("meta"):
            tensors = build_vae(json.loads(path.read_text(encoding="utf-8"))).model.state_dict()
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"no video codec in {path.parent}: {error}") from error
    encoder = _count(x for name, x in tensors.items() if name.startswith(components.ENCODER))
    return encoder, _count(tensors.values()) - encoder


def _stored(tensors: Mapping[str, Tensor]) -> str:
    """The dtypes of tensors."""
    return ", ".join(sorted({str(x.dtype).removeprefix("torch.") for x in tensors.values()}))


def _per_part(tensors: Mapping[str, Tensor]) -> str:
    """Parameters by the first part of their names."""
    parts: dict[str, list[Tensor]] = {}
    for name, x in tensors.items():
        parts.setdefault(name.partition(".")[0], []).append(x)
    counts = [f"{name} {_count(part):,}" for name, part in parts.items()]
    return f"{_count(tensors.values()):,} ({', '.join(counts)})"


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _count(tensors: Iterable[Any]) -> int:
    return sum(x.numel() for x in tensors)
