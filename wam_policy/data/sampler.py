"""The windows and the random numbers of a training step, as functions of the seed and the step.

They depend on nothing else, so a run can resume at any step.
"""

# N examples, B batch

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from wam_policy.errors import DatasetError

# Purposes of random numbers: part of the seed, so that no two purposes share a stream.
ORDER = 1
NOISE = 2


class DeterministicSampler:
    """The batches of a run: epochs in a new order each, without the incomplete last batch.

    Attributes:
        num_examples: Examples per epoch, N.
        batch_size: Examples per batch, B.
        seed: Seed of the run.
    """

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        seed: int,
        weights: Tensor | None = None,
    ) -> None:
        """Create the sampler.

        Args:
            num_examples: Number of examples, N.
            batch_size: Batch size, B.
            seed: Seed of the run.
            weights: Sampling weights [N] in any unit. An epoch then draws N examples with
                replacement.

        Raises:
            DatasetError: There are too few examples for one batch.
        """
        if num_examples < batch_size:
            raise DatasetError(
                f"{num_examples} windows do not fill a batch of {batch_size}; lower --batch-size"
            )
        self.num_examples = num_examples
        self.batch_size = batch_size
        self.seed = seed

        self._cumulative: Tensor | None = None
        if weights is not None:
            weights = weights.double()
            probabilities = weights / weights.sum()
            self._cumulative = probabilities.cumsum(0)

        # Two epochs in memory: a resumed run or a look-ahead may cross from one to the next.
        self._epoch = lru_cache(maxsize=2)(self._epoch_order)

    def batch(self, step: int) -> Tensor:
        """Return the examples of a step, counted from 0, as int [B]."""
        batches_per_epoch = self.num_examples // self.batch_size
        epoch, position = divmod(step, batches_per_epoch)
        start = position * self.batch_size
        return self._epoch(epoch)[start : start + self.batch_size]

    def _epoch_order(self, epoch: int) -> Tensor:
        """Return the examples of an epoch in their order, int [N]."""
        generator = _generator(self.seed, ORDER, epoch)
        if self._cumulative is None:
            return torch.randperm(self.num_examples, generator=generator, device="cpu")

        # Inverse transform sampling. Rounding may leave the last cumulative value below 1.
        quantiles = torch.rand(
            self.num_examples, generator=generator, dtype=torch.float64, device="cpu"
        )
        drawn = torch.searchsorted(self._cumulative, quantiles, right=True)
        return drawn.clamp(max=self.num_examples - 1)


def sample_generators(step: int, size: int, seed: int) -> list[torch.Generator]:
    """Return one random generator per sample of a step.

    What a sample draws does not depend on the other samples, the process or the device.

    Args:
        step: Step, counted from 0.
        size: Samples of the step.
        seed: Seed of the run.
    """
    return [_generator(seed, NOISE, step, sample) for sample in range(size)]


def _generator(*numbers: int) -> torch.Generator:
    """Return a generator whose seed mixes some numbers."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    seed = int(state[0] >> np.uint64(1))  # torch takes signed seeds
    return torch.Generator("cpu").manual_seed(seed)
