"""Flow matching: times, weights, noising and the Euler step; pure functions, the same for video and action.

Time runs from 1000 (noise) to 0 (data). Source: spec/fastwam.md section 3.1.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

TIMESTEPS = 1000


def shift_time(u: Tensor, shift: float) -> Tensor:
    """Move times `u` in [0, 1] towards noise: `s·u / (1 + (s − 1)·u)`."""
    return shift * u / (1 + (shift - 1) * u)


def timesteps(u: Tensor, shift: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Training timesteps in [0, 1000] of uniform draws `u` [B]; computed in float32, rounded to `dtype`."""
    return (TIMESTEPS * shift_time(u.float(), shift)).to(dtype)


def make_schedule(
    steps: int,
    shift: float,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Inference timesteps and (negative) step sizes, each [steps], from noise to data."""
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}")
    sigma = shift_time(torch.linspace(1, 0, steps + 1), shift)
    return (TIMESTEPS * sigma[:-1]).to(device, dtype), sigma.diff().to(device, dtype)


def add_noise(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Mix `clean` and `noise` [B, ...] at timesteps `t` [B]: `(1 − σ)·clean + σ·noise` with `σ = t / 1000`."""
    sigma = (t / TIMESTEPS).view(-1, *[1] * (clean.ndim - 1)).to(clean.dtype)
    return (1 - sigma) * clean + sigma * noise


def velocity(clean: Tensor, noise: Tensor) -> Tensor:
    """What the model learns to predict: `noise − clean`."""
    return noise - clean


def euler_step(x: Tensor, v: Tensor, delta: Tensor) -> Tensor:
    """One step of the sampler: `x + v·delta`."""
    return x + v * delta


def loss_weight(t: Tensor, shift: float) -> Tensor:
    """Weight of a sample's loss at timestep `t` [B], float32: a bell around 500, about 1 on average over training."""
    low, mean = _weight_constants(shift)
    return (_bell(t.float()) - low) / (mean + 1e-10)


def _bell(t: Tensor) -> Tensor:
    return torch.exp(-2 * ((t - TIMESTEPS / 2) / TIMESTEPS) ** 2)


@functools.lru_cache
def _weight_constants(shift: float) -> tuple[float, float]:
    """Minimum of the bell, and mean of what lies above it, over the training grid of 1000 times."""
    values = []
    for k in range(TIMESTEPS):
        u = 1 - k / TIMESTEPS
        t = TIMESTEPS * shift * u / (1 + (shift - 1) * u)
        values.append(math.exp(-2 * ((t - TIMESTEPS / 2) / TIMESTEPS) ** 2))
    low = min(values)
    return low, sum(values) / TIMESTEPS - low
