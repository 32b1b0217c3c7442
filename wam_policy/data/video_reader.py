"""Decodes the frames of a video file that are asked for, and no others but those they are coded from."""

# N frames, H W pixels

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from wam_policy.errors import DatasetError


def read_frames(path: Path, numbers: Sequence[int], fps: float) -> np.ndarray:
    """Frames of a video by number, uint8 [N, H, W, 3]; numbers may repeat.

    Args:
        path: the file.
        numbers: rising, from 0.
        fps: frames per second, by which a frame's time is its number.

    Raises:
        DatasetError: the file can't be decoded, or ends before.
    """
    import av

    wanted, last, found = set(numbers), max(numbers), dict[int, np.ndarray]()
    try:
        for number, frame in _from(path, min(wanted), fps):
            if number in wanted:
                found[number] = frame.to_ndarray(format="rgb24")
            if number >= last:
                break
    except (OSError, av.error.FFmpegError) as error:
        _opened.cache_clear()
        raise DatasetError(f"can't decode {path}: {error}") from error
    if missing := wanted - found.keys():
        raise DatasetError(f"{path} ends before frame {min(missing)}: it is truncated")
    return np.stack([found[number] for number in numbers])


def _from(path: Path, first: int, fps: float) -> Iterator[tuple[int, Any]]:
    """Frames from the key frame before number `first` on, with their numbers."""
    container = _opened(path, os.getpid(), threading.get_ident())
    stream = container.streams.video[0]
    container.seek(round(first / fps / float(stream.time_base)), stream=stream, backward=True)
    for frame in container.decode(stream):
        yield round(float(frame.time) * fps), frame


@lru_cache(maxsize=32)
def _opened(path: Path, process: int, thread: int) -> Any:
    """A container, kept open: windows of an episode read the same file again and again. A fork or thread has its own."""
    import av

    return av.open(str(path))
