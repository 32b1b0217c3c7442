"""Conversion of what callers pass, arrays, tensors and lists, to NumPy arrays."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from wam_policy.errors import WAMPolicyError


def as_array(value: Any, what: str, error: type[WAMPolicyError]) -> np.ndarray:
    """Return a value as an array; a tensor may have a gradient, be on any device and in bfloat16.

    Args:
        value: Array, tensor, number or (nested) list of numbers.
        what: Name of the value, for the message.
        error: Class of the error to raise.

    Returns:
        Array of the value's type; float32 for bfloat16, which NumPy does not have.

    Raises:
        WAMPolicyError: As `error`: the value is no array of numbers, text or flags.
    """
    try:
        # The wrappers run in processes that do not import PyTorch: they get no tensors.
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(value, torch.Tensor):
            value = value.detach()
            if value.dtype == torch.bfloat16:
                value = value.float()
            array = value.cpu().numpy()
        else:
            array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as problem:
        raise error(
            f"{what}: {type(value).__name__} is no array of numbers ({problem!s:.200}); pass a "
            f"NumPy array or a tensor of plain numbers"
        ) from problem
    if array.dtype == object:
        raise error(
            f"{what}: expected an array of numbers, got {value!r:.100}; pass a NumPy array or a "
            f"tensor of plain numbers"
        )
    return array
