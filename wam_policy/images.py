"""From camera pictures to the one canvas a model sees; pure functions on numpy arrays."""

# B batch, H W pixels

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image

from wam_policy.errors import ObservationError

Resize = Literal["exact", "cover"]


def fit(picture: np.ndarray, height: int, width: int, resize: Resize, name: str = "picture") -> np.ndarray:
    """Bring pictures to one size.

    Args:
        picture: uint8 [B, H, W, 3].
        height: wanted height.
        width: wanted width.
        resize: "exact" refuses any other size; "cover" resizes (bilinear, antialiased) until both sides are covered, then
            crops the centre.
        name: the camera's name, for the error.

    Returns:
        uint8 [B, height, width, 3].
    """
    got = picture.shape[1:3]
    if got == (height, width):
        return picture
    if resize == "exact":
        raise ObservationError(
            f"camera {name!r}: expected {(height, width)} (height, width), got {got}; "
            f"render at that size or wrap the env in gymnasium.wrappers.ResizeObservation"
        )
    return np.stack([_cover(frame, height, width) for frame in picture])


def _cover(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    scale = max(height / frame.shape[0], width / frame.shape[1])
    size = (max(width, round(frame.shape[1] * scale)), max(height, round(frame.shape[0] * scale)))
    resized = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR))
    top, left = (resized.shape[0] - height) // 2, (resized.shape[1] - width) // 2
    return resized[top : top + height, left : left + width]


def side_by_side(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures [B, H, W, 3] of one height, in order, as one canvas [B, H, ΣW, 3]."""
    return np.concatenate(pictures, axis=2)


def to_model(canvas: np.ndarray) -> np.ndarray:
    """Pixels uint8 [..., H, W, 3] -> float32 [..., 3, H, W] in [-1, 1]."""
    return np.moveaxis((canvas.astype(np.float32) / 255 - 0.5) / 0.5, -1, -3)


def to_pixels(frames: np.ndarray) -> np.ndarray:
    """Model frames float [..., 3, F, H, W] in [-1, 1] -> pixels uint8 [..., F, H, W, 3], cut off as the reference does."""
    return np.moveaxis(((frames.astype(np.float32) + 1) * 127.5).clip(0, 255).astype(np.uint8), -4, -1)
