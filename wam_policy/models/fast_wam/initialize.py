"""Makes an action expert out of a video expert, for training from Wan: interpolation with alpha scaling.

Source: spec/fastwam.md section 6.1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

FRESH = ("action_encoder.", "head.")  # what a video expert has no counterpart of


def action_from_video(
    video: Mapping[str, Tensor], action: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Weights of an action expert that behaves like the video expert shrunk to its widths.

    Args:
        video: the video expert's weights, by name.
        action: what the action expert's weights look like, by name; only shapes are read, `meta` tensors will do.

    Returns:
        Every weight of the action expert but those of its input and output layer, float32.
    """
    return {
        name: _shrink(video[name], like.shape)
        for name, like in action.items()
        if not name.startswith(FRESH)
    }


def _shrink(x: Tensor, shape: torch.Size) -> Tensor:
    """Interpolate `x` axis by axis, rounded to its own dtype; where the last axis shrinks, keep the outputs' variance."""
    if x.shape == shape:
        return x.float()
    shrunk = x.float()
    for axis, size in enumerate(shape):
        shrunk = _interpolate(shrunk, axis, size)
    shrunk = shrunk.to(x.dtype).float()
    if len(shape) > 1 and x.shape[-1] != shape[-1]:
        shrunk = shrunk * (x.shape[-1] / shape[-1]) ** 0.5
    return shrunk


def _interpolate(x: Tensor, axis: int, size: int) -> Tensor:
    """Linear interpolation of one axis to `size` samples, the first and last of them on the ends."""
    if x.shape[axis] == size:
        return x
    moved = x.movedim(axis, -1)
    rows = moved.reshape(1, -1, x.shape[axis])
    resized = torch.nn.functional.interpolate(rows, size=size, mode="linear", align_corners=True)
    return resized.reshape(*moved.shape[:-1], size).movedim(-1, axis)
