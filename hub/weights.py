"""Reads and writes safetensors strictly and leanly: one file, or shards with an index; whatever doesn't fit is named."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from wam_policy.errors import WeightsError

SHARD_BYTES = 5 * 10**9
CAST_BYTES = 256 * 2**20  # of a file that is cast, so much is in memory at a time


def weight_files(folder: Path, stem: str) -> list[Path]:
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
        raise WeightsError(
            f"{folder} lacks the shards {missing}; download them with `force_download=True`"
        )
    return [folder / name for name in names]


def read_weights(
    folder: Path, stem: str = "model", only: frozenset[str] | None = None
) -> dict[str, Tensor]:
    """All tensors of a model, or those named by `only`, memory-mapped where the platform allows.

    Raises:
        WeightsError: files are missing, truncated or not safetensors, or two shards hold the same tensor.
    """
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder, stem):
        shard = read_weights_file(path, only)
        if repeated := sorted(shard.keys() & tensors.keys()):
            raise WeightsError(f"{path} repeats tensors of another shard: {repeated[:5]}")
        tensors |= shard
    return tensors


def read_weights_file(path: Path, only: frozenset[str] | None = None) -> dict[str, Tensor]:
    """The tensors of one file, or those of them named by `only`, memory-mapped where the platform allows.

    Raises:
        WeightsError: it is missing, truncated or not safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {
                name: file.get_tensor(name)
                for name in file.offset_keys()
                if only is None or name in only
            }
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} can't be read as safetensors ({error}): it is truncated, corrupted or of another format; "
            f"download it again with `force_download=True`"
        ) from error


def check_fit(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Refuse tensors that are not exactly those expected, by name and shape, or that are of several dtypes.

    Raises:
        WeightsError: naming missing, unexpected and misshapen tensors, or the dtypes.
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
            f"{what} doesn't fit its contract; {'; '.join(problems)}. "
            f"They are of two models: take config and weights from one checkpoint"
        )
    check_dtype(tensors, what)


def check_dtype(tensors: Mapping[str, Tensor], what: str) -> None:
    """Refuse tensors that are not all of one floating dtype: nobody trained them so, a conversion stopped half way.

    Raises:
        WeightsError: naming the dtypes and a tensor of each.
    """
    one_of_each = {x.dtype: name for name, x in tensors.items()}
    if len(one_of_each) > 1 or not all(dtype.is_floating_point for dtype in one_of_each):
        found = ", ".join(
            f"{str(dtype).removeprefix('torch.')} ({name})" for dtype, name in one_of_each.items()
        )
        raise WeightsError(
            f"{what} must hold one floating dtype, it holds {found}; cast it to one before it is loaded"
        )


def load_weights(
    model: nn.Module,
    folder: Path,
    stem: str = "model",
    *,
    dtype: torch.dtype,
    device: torch.device,
    only: tuple[str, ...] = ("",),
    holds: tuple[str, ...] = ("",),
) -> None:
    """Give a model built on the `meta` device its weights.

    Weights that are already of `dtype` stay memory-mapped on the CPU: they are read when they are first used. Others are cast
    a piece at a time, so that no more than `CAST_BYTES` of the file is in memory beside the result.

    Args:
        model: the model.
        folder: folder of the files.
        stem: their name, as in `files`.
        dtype: what the model computes in.
        device: where.
        only: prefixes of the tensors to load.
        holds: prefixes of the tensors that the files must hold, and no others; all of them are checked.

    Raises:
        WeightsError: see `read` and `fit`.
    """
    tensors = read_weights(folder, stem)
    expected = {name: x for name, x in model.state_dict().items() if name.startswith(holds)}
    check_fit(tensors, expected, str(folder / stem))
    wanted = {name: x for name, x in tensors.items() if name.startswith(only)}
    if device.type == "cpu" and all(x.dtype == dtype for x in wanted.values()):
        model.load_state_dict(wanted, strict=False, assign=True)
        return
    pieces = list(_pieces(wanted))
    del tensors, wanted  # or the mapped files would count as memory for as long as the cast takes
    for piece in pieces:
        cast = {name: x.to(device, dtype) for name, x in read_weights(folder, stem, piece).items()}
        model.load_state_dict(cast, strict=False, assign=True)


def assign_weights(
    model: nn.Module,
    tensors: dict[str, Tensor],
    what: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Give a model built on the `meta` device these tensors; `tensors` is emptied, so that each is freed once it is cast.

    Raises:
        WeightsError: see `fit`.
    """
    check_fit(tensors, model.state_dict(), what)
    model.load_state_dict(
        {name: tensors.pop(name).to(device, dtype) for name in list(tensors)}, assign=True
    )


def _pieces(tensors: Mapping[str, Tensor]) -> Iterator[frozenset[str]]:
    """Names of tensors of `CAST_BYTES` together, or of one that is larger."""
    piece: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if piece and size + tensor.nbytes > CAST_BYTES:
            yield frozenset(piece)
            piece, size = [], 0
        piece.append(name)
        size += tensor.nbytes
    yield frozenset(piece)


def write_weights(
    folder: Path,
    tensors: Mapping[str, Tensor],
    stem: str = "model",
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write tensors as one file, or as shards of at most `shard_bytes` (or one tensor) with an index.

    Args:
        folder: where.
        tensors: by name; memory-mapped ones are read a shard at a time.
        stem: name of the files.
        dtype: what they are stored in; None: what they are.
        shard_bytes: size of a shard.
    """

    def stored(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", dtype).contiguous()

    sizes = {name: x.numel() * (dtype or x.dtype).itemsize for name, x in tensors.items()}
    shards: list[list[str]] = [[]]
    size = 0
    for name in tensors:
        if size + sizes[name] > shard_bytes and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += sizes[name]
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for name, shard in zip(names, shards, strict=True):
        save_file(
            {key: stored(tensors[key]) for key in shard}, folder / name, metadata={"format": "pt"}
        )
