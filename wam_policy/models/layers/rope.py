"""Rotary position embeddings, and the sinusoidal embedding of timesteps."""

# B batch, H heads, S tokens, d head width

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

THETA = 10_000.0


class Rope(NamedTuple):
    """Rotary tables of a token sequence: cosines and sines, each [S, d / 2]."""

    cos: Tensor
    sin: Tensor


def _angles(positions: int, dim: int) -> Tensor:
    """Return the angles of positions 0 … positions − 1, float64 [positions, dim / 2]."""
    # On the CPU whatever PyTorch's default device is.
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim
    frequencies = THETA**-exponents
    indices = torch.arange(positions, dtype=torch.float64, device="cpu")
    return torch.outer(indices, frequencies)


def _tables(angles: Tensor, device: torch.device, dtype: torch.dtype) -> Rope:
    """Return the tables of angles [S, d / 2]."""
    cos = angles.cos().to(device, dtype)
    sin = angles.sin().to(device, dtype)
    return Rope(cos, sin)


@functools.lru_cache(maxsize=64)
def action_rope(horizon: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> Rope:
    """Return the tables of the actions of a chunk, at positions 0 … horizon − 1."""
    # The cache outlives an inference-mode block, so its tensors must be usable outside of one.
    with torch.inference_mode(False):
        angles = _angles(horizon, head_dim)
        return _tables(angles, device, dtype)


@functools.lru_cache(maxsize=64)
def video_rope(
    grid: tuple[int, int, int],
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
    start: int = 0,
) -> Rope:
    """Return the tables of a grid of video tokens.

    The channels of a head are divided among the three axes: 44, 42 and 42 of 128.

    Args:
        grid: Numbers of latent frames, token rows and token columns.
        head_dim: Channels of a head.
        device: Device of the tables.
        dtype: Type of the tables.
        start: Position of the grid's first frame in its clip.
    """
    frames, rows, columns = grid
    spatial_dim = 2 * (head_dim // 6)
    frame_dim = head_dim - 2 * spatial_dim

    # The cache outlives an inference-mode block, so its tensors must be usable outside of one.
    with torch.inference_mode(False):
        frame_angles = _angles(start + frames, frame_dim)[start:]
        row_angles = _angles(rows, spatial_dim)
        column_angles = _angles(columns, spatial_dim)

        # Each axis is constant along the other two.
        parts = (
            frame_angles[:, None, None].expand(*grid, -1),
            row_angles[None, :, None].expand(*grid, -1),
            column_angles[None, None, :].expand(*grid, -1),
        )
        angles = torch.cat(parts, dim=-1).flatten(0, 2)
        return _tables(angles, device, dtype)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate adjacent pairs of channels, computed in the type of the tables.

    Args:
        x: [B, H, S, d] queries or keys.
        rope: Tables of the S tokens.

    Returns:
        [B, H, S, d] in the type of `x`.
    """
    wide = x.to(rope.cos.dtype)
    even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
    rotated_even = even * rope.cos - odd * rope.sin
    rotated_odd = even * rope.sin + odd * rope.cos
    rotated = torch.stack((rotated_even, rotated_odd), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """Embed timesteps as cosines followed by sines of angles in float64.

    Args:
        t: [...] timesteps.
        dim: Width of the embedding, even.

    Returns:
        [..., dim] in the type of `t`.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float64, device=t.device) / half
    frequencies = THETA**-exponents
    angles = t.double().unsqueeze(-1) * frequencies
    embedding = torch.cat((angles.cos(), angles.sin()), dim=-1)
    return embedding.to(t.dtype)
