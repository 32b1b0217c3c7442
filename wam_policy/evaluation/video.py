"""Writes frames as an mp4 that every player shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np


def write_mp4(path: Path, frames: Sequence[np.ndarray], *, fps: int, enlarge: int = 1) -> None:
    """Write frames uint8 [H, W, 3]; the file appears when it is complete.

    Args:
        path: the file.
        frames: pictures of one size.
        fps: frames per second.
        enlarge: how many times larger each pixel is drawn.
    """
    temporary = path.with_suffix(".partial.mp4")
    with av.open(str(temporary), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "18"})
        height, width = (side * enlarge for side in frames[0].shape[:2])
        stream.width, stream.height, stream.pix_fmt = (
            width + width % 2,
            height + height % 2,
            "yuv420p",
        )
        for frame in frames:
            large = np.repeat(np.repeat(frame, enlarge, axis=0), enlarge, axis=1)
            padded = np.pad(large, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(np.ascontiguousarray(padded), format="rgb24")
                )
            )
        container.mux(stream.encode())
    temporary.replace(path)
