"""Which examples a step sees and what is random about them: functions of the seed and the step, so a run can go on anywhere."""

# N examples, B batch

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from wam_policy.errors import DatasetError


def batch_of(step: int, size: int, examples: int, seed: int) -> Tensor:
    """Examples that a step sees, int [size]: each pass over all of them in a new order, less what is left at its end.

    Args:
        step: of the run, from 0.
        size: B.
        examples: N.
        seed: of the run.

    Raises:
        DatasetError: there are too few examples for a batch.
    """
    if examples < size:
        raise DatasetError(f"{examples} windows don't fill a batch of {size}; lower --batch-size")
    number, place = divmod(step, examples // size)
    return _order(examples, seed, number)[place * size : (place + 1) * size]


@lru_cache(maxsize=2)
def _order(examples: int, seed: int, number: int) -> Tensor:
    return torch.randperm(examples, generator=_generator(seed, number))


def generators(step: int, size: int, seed: int) -> list[torch.Generator]:
    """A source of random numbers for each sample of a step: what it draws depends on no other sample, process or device."""
    return [_generator(seed, step, sample) for sample in range(size)]


def _generator(*numbers: int) -> torch.Generator:
    mixed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(mixed[0] >> np.uint64(1)))
