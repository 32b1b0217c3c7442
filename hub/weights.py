"""Strict reading and writing of safetensors weights, in one file or in shards with an index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from wam_policy.errors import WeightsError
from wam_policy.utils import documents

# Dtypes that models compute in, and in which their weights may be stored.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

SHARD_BYTES = 5 * 10**9

# Bytes of a file that are in memory at a time while its tensors are cast.
CAST_BYTES = 256 * 2**20

# Names that an error message lists before it only counts the others.
_LISTED_NAMES = 5


def weight_files(folder: Path, stem: str) -> list[Path]:
    """Return the files of a model: `<stem>.safetensors`, or the shards listed in its index.

    Args:
        folder: Folder of the files.
        stem: Common beginning of the file names; the index is `<stem>.safetensors.index.json`.

    Returns:
        Existing files, shards in the order of their names.

    Raises:
        WeightsError: The files or some shards are missing, both forms are there, or the index is
            malformed.
    """
    single = folder / f"{stem}.safetensors"
    if not single.is_file():
        names = sorted(set(read_index(folder, stem).values()))
        return [folder / name for name in names]

    # Which of the two is meant cannot be told.
    others = sorted(path.name for path in folder.glob(f"{stem}-*-of-*.safetensors"))
    if index_path(folder, stem).is_file():
        others.append(index_path(folder, stem).name)
    if others:
        raise WeightsError(
            f"{folder} holds {single.name} and also {', '.join(others[:_LISTED_NAMES])}; "
            f"remove what belongs to another checkpoint"
        )
    return [single]


def index_path(folder: Path, stem: str) -> Path:
    """Return the path of the index of a model that is stored in shards."""
    return folder / f"{stem}.safetensors.index.json"


def read_index(folder: Path, stem: str) -> dict[str, str]:
    """Return the shard of each tensor, from the index.

    Raises:
        WeightsError: The index or a shard is missing, or the index is malformed.
    """
    index = index_path(folder, stem)
    if not index.is_file():
        raise WeightsError(
            f"{folder} has neither {stem}.safetensors nor {index.name}: "
            f"the download is incomplete, or the folder is not a checkpoint"
        )
    cure = "download it again"
    weight_map = documents.read_json_object(index, WeightsError, cure).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise WeightsError(
            f"{index} is not a safetensors index: its `weight_map` must name the file of each "
            f"tensor; {cure}"
        )

    # A name with a folder in it, which could point outside the checkpoint, counts as missing.
    names = sorted(set(weight_map.values()))
    files = {path.name for path in folder.glob("*.safetensors") if path.is_file()}
    missing = [name for name in names if name not in files]
    if missing:
        raise WeightsError(
            f"{folder} lacks the shards {str(missing[:_LISTED_NAMES])[:500]}; "
            f"download them with `force_download=True`"
        )
    return dict(weight_map)


def read_shapes(folder: Path, stem: str = "model") -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a model, from the files' headers.

    Raises:
        WeightsError: See `read_weights`.
    """
    shapes = {}
    for path in weight_files(folder, stem):
        with _opened(path) as file:
            for name in file.offset_keys():
                shapes[name] = tuple(file.get_slice(name).get_shape())
    return shapes


def read_weights(
    folder: Path, stem: str = "model", only: frozenset[str] | None = None
) -> dict[str, Tensor]:
    """Read the tensors of a model, memory-mapped where the platform allows.

    Args:
        folder: Folder of the files.
        stem: Common beginning of the file names, as in `weight_files`.
        only: Names of the tensors to read; None for all.

    Returns:
        Tensors by name.

    Raises:
        WeightsError: Files are missing, truncated or not safetensors, two shards hold the same
            tensor, or the index names another shard of a tensor.
    """
    files = weight_files(folder, stem)
    index = None
    if files != [folder / f"{stem}.safetensors"]:
        index = read_index(folder, stem)

    tensors: dict[str, Tensor] = {}
    for path in files:
        shard = read_weights_file(path, only)
        _check_index(path, shard, index, only)
        repeated = sorted(shard.keys() & tensors.keys())
        if repeated:
            raise WeightsError(
                f"{path} repeats tensors of another shard: {repeated[:_LISTED_NAMES]}"
            )
        tensors |= shard
    return tensors


def read_weights_file(path: Path, only: frozenset[str] | None = None) -> dict[str, Tensor]:
    """Read the tensors of one file, memory-mapped where the platform allows.

    Args:
        path: A safetensors file.
        only: Names of the tensors to read; None for all.

    Returns:
        Tensors by name.

    Raises:
        WeightsError: The file is missing, truncated or not safetensors.
    """
    tensors = {}
    with _opened(path) as file:
        for name in file.offset_keys():
            if only is None or name in only:
                tensors[name] = file.get_tensor(name)
    return tensors


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file; what fails while it is open is an error of the file."""
    try:
        # The tensors are on the CPU whatever PyTorch's default device is.
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(
            f"{path} cannot be read as safetensors ({error}): it is truncated, corrupted or in "
            f"another format; download it again with `force_download=True`"
        ) from error


def _check_index(
    path: Path,
    shard: Mapping[str, Tensor],
    index: Mapping[str, str] | None,
    only: frozenset[str] | None,
) -> None:
    """Check that a shard holds the tensors that the index says it does, if there is an index."""
    if index is None:
        return
    expected = {name for name, file in index.items() if file == path.name}
    if only is not None:
        expected &= only
    wrong = sorted(expected ^ shard.keys())
    if wrong:
        raise WeightsError(
            f"{path} and the index beside it differ in {_abbreviate(wrong)}; "
            f"take both from one checkpoint"
        )


def check_fit(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Check that tensors have exactly the expected names and shapes, and one dtype.

    Args:
        tensors: Tensors by name.
        expected: Tensors of the expected names and shapes; their values and dtypes do not matter.
        what: Name of the tensors' source for the error message.

    Raises:
        WeightsError: Tensors are missing, unexpected or misshapen, or have several dtypes.
    """
    misshapen = []
    for name in sorted(expected.keys() & tensors.keys()):
        shape = list(tensors[name].shape)
        expected_shape = list(expected[name].shape)
        if shape != expected_shape:
            misshapen.append(f"{name} is {shape}, expected {expected_shape}")

    names_by_problem = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - expected.keys()),
        "misshapen": misshapen,
    }
    problems = [
        f"{problem}: {_abbreviate(names)}" for problem, names in names_by_problem.items() if names
    ]
    if problems:
        raise WeightsError(
            f"{what} does not match its configuration; {'; '.join(problems)}. "
            f"The two belong to different models: take both from one checkpoint"
        )
    check_dtype(tensors, what)


def _abbreviate(names: list[str]) -> str:
    """Return the first names, comma-separated, and the number of the others."""
    listed = ", ".join(names[:_LISTED_NAMES])
    if len(names) > _LISTED_NAMES:
        listed += f" and {len(names) - _LISTED_NAMES} more"
    return listed


def check_dtype(tensors: Mapping[str, Tensor], what: str) -> None:
    """Check that all tensors have one dtype, which models compute in.

    No training stores several dtypes: such a file comes from a conversion that stopped half-way.

    Args:
        tensors: Tensors by name.
        what: Name of the tensors' source for the error message.

    Raises:
        WeightsError: There are several dtypes, or one that nothing computes in; the message names a
            tensor of each.
    """
    examples = {tensor.dtype: name for name, tensor in tensors.items()}
    if len(examples) <= 1 and all(dtype in DTYPES for dtype in examples):
        return

    computed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
    listed = ", ".join(
        f"{str(dtype).removeprefix('torch.')} ({name})" for dtype, name in examples.items()
    )
    raise WeightsError(
        f"{what} must store one dtype of {computed}, but stores {listed}; "
        f"cast all tensors to one of these before loading them"
    )


def check_finite(tensors: Iterable[tuple[str, Tensor]], what: str) -> None:
    """Check that tensors hold no NaN and no infinity, in one pass over their memory.

    Args:
        tensors: Names and tensors.
        what: Name of the tensors' source for the error message.

    Raises:
        WeightsError: One is not finite; the message names it.
    """
    for name, tensor in tensors:
        if tensor.numel() == 0:
            continue
        # Both are NaN if any number is.
        low, high = torch.aminmax(tensor.detach())
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise WeightsError(
                f"{what}: {name} is not finite: the training diverged, the file is damaged, or "
                f"its dtype cannot hold the numbers; take another checkpoint"
            )


def load_weights(
    model: nn.Module,
    folder: Path,
    stem: str = "model",
    *,
    dtype: torch.dtype,
    device: torch.device,
    prefixes: tuple[str, ...] = ("",),
    expected_prefixes: tuple[str, ...] = ("",),
    mmap: bool = True,
) -> None:
    """Load weights into a model that was built on the `meta` device.

    Weights that have `dtype` already stay memory-mapped on the CPU and are read at first use.
    Others are cast in pieces, so that at most `CAST_BYTES` of the file (or one tensor, if it is
    larger) are in memory beside the result.

    Args:
        model: Model to load into.
        folder: Folder of the files.
        stem: Common beginning of the file names, as in `weight_files`.
        dtype: Dtype of the loaded weights.
        device: Device of the loaded weights.
        prefixes: Prefixes of the names of the tensors to load.
        expected_prefixes: Prefixes of the names of the tensors that the files must hold, and no
            others. All of these are checked, also those that are not loaded.
        mmap: Leave weights that have `dtype` already in the mapped file; False copies them.

    Raises:
        WeightsError: See `read_weights` and `check_fit`.
    """
    tensors = read_weights(folder, stem)
    state = model.state_dict()
    expected = {name: x for name, x in state.items() if name.startswith(expected_prefixes)}
    check_fit(tensors, expected, str(folder / stem))

    # All names were checked above; `strict=False` because only a part of them is loaded at a time.
    selected = {name: x for name, x in tensors.items() if name.startswith(prefixes)}
    is_stored = device.type == "cpu" and all(x.dtype == dtype for x in selected.values())
    if mmap and is_stored:
        model.load_state_dict(selected, strict=False, assign=True)
        return

    # The mapped files would count as memory for as long as the cast takes: drop them first.
    pieces = list(_pieces(selected))
    del tensors, selected
    for names in pieces:
        cast = _read_cast(folder, stem, names, dtype, device)
        model.load_state_dict(cast, strict=False, assign=True)


def _pieces(tensors: Mapping[str, Tensor]) -> Iterator[frozenset[str]]:
    """Yield sets of names whose tensors take at most `CAST_BYTES`, or of one larger tensor."""
    piece: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if piece and size + tensor.nbytes > CAST_BYTES:
            yield frozenset(piece)
            piece = []
            size = 0
        piece.append(name)
        size += tensor.nbytes
    yield frozenset(piece)


def _read_cast(
    folder: Path, stem: str, names: frozenset[str], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Read some tensors and cast them; their memory-mapped originals are gone at the return."""
    tensors = read_weights(folder, stem, names)
    return {name: tensor.to(device, dtype, copy=True) for name, tensor in tensors.items()}


def assign_weights(
    model: nn.Module,
    tensors: dict[str, Tensor],
    what: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    mmap: bool = True,
) -> None:
    """Assign tensors to a model that was built on the `meta` device.

    Args:
        model: Model to assign to.
        tensors: All weights of the model by name. The dictionary is emptied, so that each tensor
            can be freed once it is cast.
        what: Name of the tensors' source for the error message.
        dtype: Dtype of the assigned weights.
        device: Device of the assigned weights.
        mmap: Keep tensors that need no cast as they are; False copies them.

    Raises:
        WeightsError: See `check_fit`.
    """
    check_fit(tensors, model.state_dict(), what)
    cast = {name: tensors.pop(name).to(device, dtype, copy=not mmap) for name in list(tensors)}
    model.load_state_dict(cast, assign=True)


def write_weights(
    folder: Path,
    tensors: Mapping[str, Tensor],
    stem: str = "model",
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write tensors as one file, or as several shards with an index.

    Args:
        folder: Existing folder to write into.
        tensors: Tensors by name; memory-mapped ones are read a shard at a time.
        stem: Common beginning of the file names, as in `weight_files`.
        dtype: Dtype to store the tensors in; None keeps each tensor's own.
        shard_bytes: Largest size of a shard in bytes; a larger tensor has a shard of its own.

    Raises:
        WeightsError: A tensor is not finite in that dtype.
    """
    sizes = {name: x.numel() * (dtype or x.dtype).itemsize for name, x in tensors.items()}
    shards = _split_into_shards(sizes, shard_bytes)

    # A single file needs no index.
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        count = len(shards)
        names = [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        weight_map = {}
        for name, shard in zip(names, shards, strict=True):
            weight_map.update(dict.fromkeys(shard, name))
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        text = json.dumps(index, indent=2)
        index_path(folder, stem).write_text(text, encoding="utf-8")

    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, tensors, shard, dtype)


def _write_shard(
    path: Path, tensors: Mapping[str, Tensor], names: list[str], dtype: torch.dtype | None
) -> None:
    """Write some of the tensors to one file; their copies on the CPU are gone at the return."""
    content = {name: tensors[name].detach().to("cpu", dtype).contiguous() for name in names}
    check_finite(content.items(), f"in {dtype or 'its own dtype'}, the new {path.name}")
    save_file(content, path, metadata={"format": "pt"})


def _split_into_shards(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    """Group tensor names, in their order, into shards.

    Args:
        sizes: Bytes of each tensor by name.
        shard_bytes: Largest size of a shard in bytes; a larger tensor has a shard of its own.

    Returns:
        Names of the tensors of each shard; one empty shard if there are no tensors.
    """
    shards: list[list[str]] = [[]]
    total = 0
    for name, size in sizes.items():
        if total + size > shard_bytes and shards[-1]:
            shards.append([])
            total = 0
        shards[-1].append(name)
        total += size
    return shards
