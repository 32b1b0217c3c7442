"""Which examples a step sees and what is random about them: functions of the seed and the step, so a run can go on anywhere."""

# N examples, B batch

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from wam_policy.errors import DatasetError

ORDER, NOISE = 1, 2  # what random numbers are for: no two uses share a source


class DeterministicSampler:
    """The batches of a run: each pass over all examples in a new order, less what is left at its end."""

    def __init__(self, examples: int, size: int, seed: int, weights: Tensor | None = None) -> None:
        """Settle the order.

        Args:
            examples: N.
            size: B.
            seed: of the run.
            weights: [N], how often each is drawn, in any unit: a pass then draws N times, some twice and others not at all.

        Raises:
            DatasetError: there are too few examples for a batch.
        """
        if examples < size:
            raise DatasetError(
                f"{examples} windows don't fill a batch of {size}; lower --batch-size"
            )
        self.num_examples, self.size, self.seed = examples, size, seed
        self._cumulated = (
            None if weights is None else (weights.double() / weights.double().sum()).cumsum(0)
        )
        self._pass = lru_cache(maxsize=2)(self._shuffled)

    def batch(self, step: int) -> Tensor:
        """The examples that a step, from 0, sees: int [B]."""
        number, place = divmod(step, self.num_examples // self.size)
        return self._pass(number)[place * self.size : (place + 1) * self.size]

    def _shuffled(self, number: int) -> Tensor:
        source = _generator(self.seed, ORDER, number)
        if self._cumulated is None:
            return torch.randperm(self.num_examples, generator=source)
        drawn = torch.rand(self.num_examples, generator=source, dtype=torch.float64)
        return torch.searchsorted(self._cumulated, drawn, right=True).clamp(
            max=self.num_examples - 1
        )


def sample_generators(step: int, size: int, seed: int) -> list[torch.Generator]:
    """A source of random numbers for each sample of a step: what it draws depends on no other sample, process or device."""
    return [_generator(seed, NOISE, step, sample) for sample in range(size)]


def _generator(*numbers: int) -> torch.Generator:
    mixed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(mixed[0] >> np.uint64(1)))
