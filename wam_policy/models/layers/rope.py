"""Rotary position embeddings, and the sinusoidal embedding of timesteps."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

THETA = 10_000.0


class Rope(NamedTuple):
    """Rotary tables of a token sequence: cos and sin, [S, d / 2]."""

    cos: Tensor
    sin: Tensor


def _angles(positions: int, dim: int) -> Tensor:
    frequencies = THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return torch.outer(torch.arange(positions, dtype=torch.float64), frequencies)


@functools.lru_cache(maxsize=64)
def action_rope(horizon: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> Rope:
    """Tables of action positions 0 .. horizon − 1."""
    with torch.inference_mode(False):  # a table outlives the mode it was made in
        angles = _angles(horizon, head_dim)
        return Rope(angles.cos().to(device, dtype), angles.sin().to(device, dtype))


@functools.lru_cache(maxsize=64)
def video_rope(
    grid: tuple[int, int, int],
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
    start: int = 0,
) -> Rope:
    """Tables of a (frames, rows, columns) token grid that begins at frame `start`.

    The channel pairs are split between the three axes.
    """
    with torch.inference_mode(False):
        spatial = 2 * (head_dim // 6)  # 44 | 42 | 42 channels of 128
        ends = (start + grid[0], *grid[1:])
        axes = [
            _angles(n, dim)
            for n, dim in zip(ends, (head_dim - 2 * spatial, spatial, spatial), strict=True)
        ]
        axes[0] = axes[0][start:]
        shapes = [(-1, 1, 1), (1, -1, 1), (1, 1, -1)]
        parts = [
            a.view(*shape, a.shape[-1]).expand(*grid, -1)
            for a, shape in zip(axes, shapes, strict=True)
        ]
        angles = torch.cat(parts, dim=-1).flatten(0, 2)
        return Rope(angles.cos().to(device, dtype), angles.sin().to(device, dtype))


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate adjacent channel pairs of `x` [B, H, S, d] by the tables, in their dtype."""
    even, odd = x.to(rope.cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack(
        (even * rope.cos - odd * rope.sin, even * rope.sin + odd * rope.cos), dim=-1
    )
    return rotated.flatten(-2).to(x.dtype)


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """Embed timesteps [...] as [..., dim]: cosines first, angles in float64, result in `t`'s dtype."""
    half = dim // 2
    frequencies = THETA ** -(torch.arange(half, dtype=torch.float64, device=t.device) / half)
    angles = t.double().unsqueeze(-1) * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(t.dtype)
