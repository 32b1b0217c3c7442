"""Reads `torch.save` files as data: tensors and plain containers, memory-mapped; code in them is never run."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from wam_policy.errors import WeightsError


def read_pickle(path: Path) -> Any:
    """What the file holds, tensors on the CPU.

    Raises:
        WeightsError: it can't be read, or holds more than data.
    """
    try:
        return torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} holds code, or isn't a file of `torch.save`: it is not loaded ({error!s:.120}…); "
            f"have its author publish plain tensors, best as safetensors"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        raise WeightsError(f"{path} can't be read ({error!r:.200}); fetch it again") from error
