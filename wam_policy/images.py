"""From camera pictures to the one canvas a model sees; pure functions on numpy arrays."""

# B batch, H W pixels

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from wam_policy.config import Layout, Pixels, Resize
from wam_policy.errors import ObservationError

if TYPE_CHECKING:
    from wam_policy.config import CameraConfig


def resize_pictures(
    picture: np.ndarray,
    height: int,
    width: int,
    resize: Resize,
    name: str = "picture",
    *,
    pixels: Pixels = "uint8",
) -> np.ndarray:
    """Bring pictures to one size, bilinear and antialiased.

    Args:
        picture: uint8 [B, H, W, 3], or float32 that was resized before.
        height: wanted height.
        width: wanted width.
        resize: "exact" refuses any other size; "cover" keeps the proportions, until both sides are covered, and crops the
            centre; "stretch" doesn't keep them.
        name: the camera's name, for the error.
        pixels: "uint8" rounds resized pictures to whole levels, as the references' evaluation does; "float" doesn't, as their
            training does.

    Returns:
        [B, height, width, 3], uint8 or, for float pixels, float32 in [0, 255].
    """
    got = picture.shape[1:3]
    if got != (height, width) and resize == "exact":
        raise ObservationError(
            f"camera {name!r}: expected {(height, width)} (height, width), got {got}; "
            f"render at that size or wrap the env in gymnasium.wrappers.ResizeObservation"
        )
    levels = picture if pixels == "uint8" else picture.astype(np.float32, copy=False)
    if got == (height, width):
        return levels
    size = (height, width)
    if resize == "cover":
        scale = max(height / got[0], width / got[1])
        size = (max(height, round(got[0] * scale)), max(width, round(got[1] * scale)))
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    resized = np.stack([_resized(frame, *size) for frame in levels])
    return resized[:, top : top + height, left : left + width]


def _resized(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """One picture [H, W, 3] at another size; of float pictures PIL takes one colour at a time."""

    def resize(x: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(x).resize((width, height), Image.Resampling.BILINEAR))

    if frame.dtype == np.uint8:
        return resize(frame)
    return np.stack(
        [resize(np.ascontiguousarray(colour)) for colour in np.moveaxis(frame, -1, 0)], axis=-1
    )


def tiles(cameras: int, height: int, width: int, layout: Layout) -> list[tuple[int, int]]:
    """Height and width of each camera's place on the canvas; in a "t" the first has twice the sides of the other two."""
    return [
        (2 * height, 2 * width) if layout == "t" and i == 0 else (height, width)
        for i in range(cameras)
    ]


def compose(pictures: Sequence[np.ndarray], layout: Layout) -> np.ndarray:
    """Pictures [B, H, W, 3], in order and of the sizes of `tiles`, as one canvas.

    "row": all side by side. "t": the first on top, the others side by side below it.
    """
    if layout == "row":
        return np.concatenate(pictures, axis=2)
    return np.concatenate((pictures[0], np.concatenate(pictures[1:], axis=2)), axis=1)


def split(canvas: np.ndarray, cameras: CameraConfig) -> dict[str, np.ndarray]:
    """A canvas [..., H, W] cut into its cameras' places, the inverse of `compose`."""
    height, width, names = cameras.height, cameras.width, cameras.names
    if cameras.layout == "row":
        return {name: canvas[..., i * width : (i + 1) * width] for i, name in enumerate(names)}
    below = canvas[..., 2 * height :, :]
    rest = {name: below[..., i * width : (i + 1) * width] for i, name in enumerate(names[1:])}
    return {names[0]: canvas[..., : 2 * height, :], **rest}


def canvas_size(cameras: CameraConfig) -> tuple[int, int]:
    """Height and width of the canvas."""
    rows, columns = (3, 2) if cameras.layout == "t" else (1, len(cameras.names))
    return rows * cameras.height, columns * cameras.width


def canvas(pictures: Mapping[str, np.ndarray], cameras: CameraConfig) -> np.ndarray:
    """Pictures by camera, uint8 [B, H, W, 3], as a model sees them: float32 [B, 3, H, W] in [-1, 1].

    Raises:
        ObservationError: a picture has another size than the contract allows.
    """
    return to_model_range(compose_canvas(pictures, cameras))


def compose_canvas(pictures: Mapping[str, np.ndarray], cameras: CameraConfig) -> np.ndarray:
    """The canvas of pictures by camera, uint8 [B, H, W, 3]: levels in [0, 255], [B, H', W', 3], uint8 or float32.

    Raises:
        ObservationError: a picture has another size than the contract allows.
    """
    fitted = []
    for name, place in zip(
        cameras.names,
        tiles(len(cameras.names), cameras.height, cameras.width, cameras.layout),
        strict=True,
    ):
        picture = pictures[name]
        for size in (place,) if cameras.before is None else (cameras.before, place):
            picture = resize_pictures(picture, *size, cameras.resize, name, pixels=cameras.pixels)
        fitted.append(picture)
    return compose(fitted, cameras.layout)


def to_model_range(canvas: np.ndarray) -> np.ndarray:
    """Levels in [0, 255], [..., H, W, 3] -> float32 [..., 3, H, W] in [-1, 1]."""
    return np.moveaxis((canvas.astype(np.float32) / 255 - 0.5) / 0.5, -1, -3)


def to_pixels(frames: np.ndarray) -> np.ndarray:
    """Model frames float [..., 3, F, H, W] in [-1, 1] -> pixels uint8 [..., F, H, W, 3], cut off as the reference does."""
    return np.moveaxis(
        ((frames.astype(np.float32) + 1) * 127.5).clip(0, 255).astype(np.uint8), -4, -1
    )
