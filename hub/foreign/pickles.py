"""Reading of `torch.save` files as data: tensors and plain containers; code is never executed."""

from __future__ import annotations

import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wam_policy.errors import WeightsError

# Largest size of an archive's content, as a multiple of the file's.
MAX_RATIO = 20

# Bytes of an entry that are in memory at a time.
PIECE_BYTES = 2**20

_PLAIN_CURE = "save plain tensors of numbers, preferably as safetensors"


def read_pickle(path: Path) -> Any:
    """Read a file of `torch.save`.

    Args:
        path: File to read.

    Returns:
        Content of the file, with tensors on the CPU; they are memory-mapped where the file's
        format allows.

    Raises:
        WeightsError: The file is unreadable, or holds more than data.
    """
    try:
        # The older format, which is not a zip archive, cannot be memory-mapped, nor can compressed
        # entries: PyTorch would take their bytes for numbers.
        is_mapped = zipfile.is_zipfile(path) and _check_entries(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} holds code, or is not a file of `torch.save`: it is not loaded "
            f"({error!s:.120}…); ask its author for plain tensors, preferably as safetensors"
        ) from error
    except (
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        ArithmeticError,
        RecursionError,
        MemoryError,
        AssertionError,
        NotImplementedError,
        zlib.error,
        zipfile.BadZipFile,
    ) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{path} cannot be read ({error!r:.200}); download it again") from error


def _check_entries(path: Path) -> bool:
    """Verify the checksums of a zip archive, and return whether all entries are stored as they are.

    PyTorch verifies none. It writes zeros where `set_crc32_options` turned them off.

    Raises:
        WeightsError: An entry is damaged, or the archive would grow beyond bounds.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        size = sum(entry.file_size for entry in entries)
        if size > MAX_RATIO * path.stat().st_size:
            raise WeightsError(
                f"{path} would grow to {size / 2**30:.1f} GiB, more than {MAX_RATIO} times its "
                f"size, which no weights do; download it again"
            )
        for entry in entries:
            checksum = 0
            with archive.open(entry) as content:
                # The class would compare the checksum itself, also one that was turned off.
                content._expected_crc = None  # type: ignore[attr-defined]
                while piece := content.read(PIECE_BYTES):
                    checksum = zlib.crc32(piece, checksum)
            if entry.CRC not in (0, checksum):
                raise WeightsError(
                    f"{path} is damaged: the checksum of {entry.filename!r} does not match; "
                    f"download it again"
                )
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)


def check_plain(name: str, tensor: object, path: Path) -> Tensor:
    """Return a tensor, after a check that it holds plain numbers in memory of its own size.

    Args:
        name: Name of the tensor.
        tensor: Value in a file of `torch.save`.
        path: Path of the file, for the error message.

    Raises:
        WeightsError: It is no tensor, or one of another kind.
    """
    if not isinstance(tensor, Tensor):
        raise WeightsError(
            f"{path}: {name} must be a tensor, got {type(tensor).__name__}; {_PLAIN_CURE}"
        )
    kind = None
    if tensor.layout != torch.strided:
        kind = f"a tensor of layout {tensor.layout}"
    elif tensor.is_quantized or tensor.is_complex():
        kind = f"a tensor of {tensor.dtype}"
    elif tensor.device.type != "cpu" or type(tensor) not in (Tensor, torch.nn.Parameter):
        kind = f"a {type(tensor).__name__} on {tensor.device}"
    elif tensor.nbytes > tensor.untyped_storage().nbytes():
        kind = f"a view of shape {list(tensor.shape)} of fewer numbers"
    if kind is not None:
        raise WeightsError(f"{path}: {name} is {kind}; {_PLAIN_CURE}")
    return tensor
