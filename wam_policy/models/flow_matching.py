"""Flow matching: timesteps, loss weights, noising and the Euler step, as pure functions.

The same functions serve the video and the actions. Timesteps run from 1000 (noise) to 0 (data).
See docs/method.md, "Flow matching".
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

TIMESTEPS = 1000  # timestep of pure noise; the noise level is t / TIMESTEPS


def shift_time(u: Tensor, shift: float) -> Tensor:
    """Move times `u` in [0, 1] towards noise: `s·u / (1 + (s − 1)·u)` with `s = shift`."""
    return shift * u / (1 + (shift - 1) * u)


def timesteps(u: Tensor, shift: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the training timesteps of uniform random numbers.

    Args:
        u: [B] uniform in [0, 1].
        shift: Shift of the schedule towards noise.
        dtype: Type of the result; the computation is in float32.

    Returns:
        [B] timesteps in [0, 1000].
    """
    shifted = shift_time(u.float(), shift)
    return (TIMESTEPS * shifted).to(dtype)


def make_schedule(
    steps: int,
    shift: float,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Return the schedule of the sampler, from noise to data.

    Args:
        steps: Number of denoising steps.
        shift: Shift of the schedule towards noise.
        dtype: Type of the result; the computation is in float32.
        device: Device of the result.

    Returns:
        Timesteps and step sizes (negative), each [steps].

    Raises:
        ValueError: `steps` is less than 1.
    """
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}")

    uniform = torch.linspace(1, 0, steps + 1, dtype=torch.float32, device="cpu")
    sigma = shift_time(uniform, shift)
    times = TIMESTEPS * sigma[:-1]
    deltas = sigma.diff()
    return times.to(device, dtype), deltas.to(device, dtype)


def add_noise(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Mix data and noise: `(1 − σ)·clean + σ·noise` with `σ = t / 1000`.

    Args:
        clean: [B, ...] data.
        noise: [B, ...] noise.
        t: [B] timesteps.
    """
    trailing = [1] * (clean.ndim - 1)
    sigma = t / TIMESTEPS
    sigma = sigma.view(-1, *trailing).to(clean.dtype)
    return (1 - sigma) * clean + sigma * noise


def velocity(clean: Tensor, noise: Tensor) -> Tensor:
    """Return the training target of the model: `noise − clean`."""
    return noise - clean


def euler_step(x: Tensor, v: Tensor, delta: Tensor) -> Tensor:
    """Take one step of the sampler: `x + v·delta`."""
    return x + v * delta


def loss_weight(t: Tensor, shift: float) -> Tensor:
    """Return each sample's loss weight: a bell around 500 with mean 1 over the training timesteps.

    Args:
        t: [B] timesteps.
        shift: Shift of the training schedule, which the normalisation depends on.

    Returns:
        [B] float32.
    """
    minimum, mean = _weight_constants(shift)
    height = _bell(t.float()) - minimum
    return height / (mean + 1e-10)


def _bell(t: Tensor) -> Tensor:
    """Return a Gaussian of the timesteps, centred at 500."""
    distance = (t - TIMESTEPS / 2) / TIMESTEPS
    return torch.exp(-2 * distance**2)


@functools.lru_cache
def _weight_constants(shift: float) -> tuple[float, float]:
    """Return the minimum of the bell on the training grid and its mean above that minimum."""
    values = []
    for index in range(TIMESTEPS):
        u = 1 - index / TIMESTEPS
        denominator = 1 + (shift - 1) * u
        t = TIMESTEPS * shift * u / denominator
        distance = (t - TIMESTEPS / 2) / TIMESTEPS
        values.append(math.exp(-2 * distance**2))

    minimum = min(values)
    mean = sum(values) / TIMESTEPS - minimum
    return minimum, mean
