"""Reads and writes safetensors strictly: one file, or shards with an index; whatever doesn't fit is named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from wam_policy.errors import WeightsError

SHARD_BYTES = 5 * 10**9


def files(folder: Path, stem: str) -> list[Path]:
    """The files of a model: `<stem>.safetensors`, or the shards that `<stem>.safetensors.index.json` lists."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise WeightsError(
            f"{folder} has neither {single.name} nor {index.name}: the download is incomplete, or it is no checkpoint"
        )
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise WeightsError(f"{index} isn't a safetensors index: {error}") from error
    missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if missing:
        raise WeightsError(f"{folder} lacks the shards {missing}; download them with `force_download=True`")
    return [folder / name for name in names]


def read(folder: Path, stem: str = "model") -> dict[str, Tensor]:
    """All tensors of a model, memory-mapped where the platform allows.

    Raises:
        WeightsError: files are missing, truncated or not safetensors, or two shards hold the same tensor.
    """
    tensors: dict[str, Tensor] = {}
    for path in files(folder, stem):
        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                if names & set(tensors):
                    raise WeightsError(f"{path} repeats tensors of another shard: {sorted(names & set(tensors))[:5]}")
                tensors |= {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            if isinstance(error, WeightsError):
                raise
            raise WeightsError(
                f"{path} can't be read as safetensors ({error}): it is truncated, corrupted or of another format; "
                f"download it again with `force_download=True`"
            ) from error
    return tensors


def fit(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Refuse tensors that are not exactly those expected, by name and shape.

    Raises:
        WeightsError: naming missing, unexpected and misshapen tensors.
    """
    missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    misshapen = [
        f"{name} is {list(tensors[name].shape)}, expected {list(expected[name].shape)}"
        for name in sorted(set(expected) & set(tensors))
        if tensors[name].shape != expected[name].shape
    ]
    problems = [
        f"{kind}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for kind, names in (("missing", missing), ("unexpected", extra), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise WeightsError(
            f"{what} doesn't fit its config.json; {'; '.join(problems)}. "
            f"Config and weights are of two models: take both from one checkpoint"
        )


def load(model: nn.Module, folder: Path, stem: str = "model", *, dtype: torch.dtype, device: torch.device) -> None:
    """Give a model built on the `meta` device its weights, cast to `dtype` on `device`."""
    tensors = read(folder, stem)
    fit(tensors, model.state_dict(), str(folder / stem))
    model.load_state_dict({name: x.to(device, dtype) for name, x in tensors.items()}, assign=True)


def write(folder: Path, tensors: Mapping[str, Tensor], stem: str = "model", shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors as one file, or as shards of at most `shard_bytes` (or one tensor) with an index."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > shard_bytes and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
