"""A random generator that objects can hold which are sent to other processes."""

from __future__ import annotations

from typing import Self

import numpy as np
import torch


class PicklableGenerator(torch.Generator):
    """PyTorch's generator on the CPU, pickled by its state.

    PyTorch pickles a generator with a tensor, which a spawned process cannot receive.
    """

    def __new__(cls) -> Self:
        """Create a generator on the CPU whatever PyTorch's default device is."""
        return super().__new__(cls, "cpu")  # type: ignore[call-arg]

    def __init__(self) -> None:
        super().__init__()

    def __reduce__(self) -> tuple[object, tuple[bytes]]:  # type: ignore[override]
        return _restored, (self.get_state().numpy().tobytes(),)


def _restored(state: bytes) -> PicklableGenerator:
    """Return a generator in a state."""
    generator = PicklableGenerator()
    generator.set_state(torch.from_numpy(np.frombuffer(state, np.uint8).copy()))
    return generator
