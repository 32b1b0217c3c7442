"""Decodes the frames of a video file at given times, and no others but those they depend on."""

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
from wam_policy.utils import pictures

# Largest distance in seconds between the time of a row and that of its frame; LeRobot's.
TOLERANCE = 1e-4

# Errors of PyAV for streams without a size, a codec or a time base.
_FORM_ERRORS = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError)


def read_frames(path: Path, times: Sequence[float]) -> np.ndarray:
    """Return the frames of a video at some times.

    Args:
        path: Video file.
        times: Times in seconds from the start of the video, in ascending order; they may repeat.

    Returns:
        Frames uint8 [N, H, W, 3], RGB.

    Raises:
        DatasetError: The file cannot be decoded, is damaged, ends early, or has no frame within
            `TOLERANCE` of a time.
    """
    import av

    frames: list[np.ndarray] = []
    nearest: list[float] = []  # time of a frame before, and of one after, the time that is missing
    try:
        for time, frame in _frames_from(path, times[0]):
            # Frames in between are decoded because others depend on them.
            while len(frames) < len(times) and abs(time - times[len(frames)]) <= TOLERANCE:
                is_repeated = frames and times[len(frames)] == times[len(frames) - 1]
                pixels = frames[-1] if is_repeated else frame.to_ndarray(format="rgb24")
                frames.append(pixels)
            if len(frames) == len(times):
                return np.stack(frames)

            # All later frames are later than the time that is missing.
            nearest = [*nearest[-1:], time]
            if time > times[len(frames)] + TOLERANCE:
                break
    except DatasetError:
        raise
    except (OSError, av.error.FFmpegError, *_FORM_ERRORS) as error:
        # The decoder may be in a broken state: the next call opens the file again.
        _containers.cache_clear()
        raise DatasetError(
            f"cannot decode {path}: {error}; download or record the dataset again"
        ) from error
    raise _no_frame(path, times[len(frames)], nearest)


def _frames_from(path: Path, first: float) -> Iterator[tuple[float, Any]]:
    """Yield times and frames, from the key frame at or before the time `first` on.

    Raises:
        DatasetError: A frame is damaged: what follows it until the next key frame is too.
    """
    stream = _video_stream(path)
    container = stream.container

    # A seek takes a time in units of the stream's time base.
    timestamp = round((first + TOLERANCE) / float(stream.time_base))
    container.seek(max(timestamp, 0), stream=stream, backward=True)
    is_decodable = False
    for frame in _decode(container, stream):
        # Frames before the key frame may lack those that they depend on.
        is_decodable = is_decodable or frame.key_frame
        if frame.time is None:
            raise DatasetError(f"{path}: a frame has no time; encode the video again with ffmpeg")
        if is_decodable and frame.is_corrupt:
            raise DatasetError(
                f"{path} is damaged at {frame.time:.3f} s; download or record the dataset again"
            )
        yield float(frame.time), frame


def _decode(container: Any, stream: Any) -> Iterator[Any]:
    """Yield the frames of a stream."""
    yield from container.decode(stream)


def _video_stream(path: Path) -> Any:
    """Return the video stream of a file, which stays open for the next call.

    Raises:
        DatasetError: The file is no video, its pictures are too large, or its time does not begin
            at zero.
    """
    import av

    try:
        container = _containers(path, threading.get_ident())
        stream = container.streams.video[0]
        pixels = stream.width * stream.height
        start = float((stream.start_time or 0) * stream.time_base)
    except (OSError, av.error.FFmpegError, *_FORM_ERRORS) as error:
        raise DatasetError(
            f"cannot decode {path}: {error}; download or record the dataset again"
        ) from error
    if pixels > pictures.MAX_PIXELS:
        raise DatasetError(
            f"{path} has frames of {stream.width}×{stream.height}, which are not read: "
            f"scale the video"
        )

    # Whether the first frame is then that of time 0 or a later one, no file says.
    if abs(start) > TOLERANCE:
        raise DatasetError(
            f"{path} begins at {start:.4f} s, but the first frame of a dataset's video is at 0 s; "
            f"shift it: ffmpeg -i OLD.mp4 -c copy -avoid_negative_ts make_zero NEW.mp4"
        )
    return stream


def _no_frame(path: Path, time: float, nearest: Sequence[float]) -> DatasetError:
    """Return the error of a time at which a video has no frame.

    Args:
        path: Video file.
        time: Time without a frame.
        nearest: Times of the frames before and after it, as far as there are any.
    """
    stream = _video_stream(path)
    if not nearest or nearest[-1] < time:
        # The file ends. Its header says how long it should be.
        end = nearest[-1] if nearest else 0.0
        duration = float((stream.duration or 0) * stream.time_base)
        rate = float(stream.average_rate or 1)
        if duration > end + 1.5 / rate:
            return DatasetError(
                f"{path} ends before {time:.4f} s: it is truncated, its frames end at {end:.4f} s "
                f"of {duration:.4f} s; download or record it again"
            )
        return DatasetError(
            f"a row's timestamp is {time:.4f} s, but the last frame of {path} is at {end:.4f} s; "
            f"correct the timestamps, or take the video that belongs to these rows"
        )
    closest = min(nearest, key=lambda other: abs(other - time))
    return DatasetError(
        f"a row's timestamp is {time:.4f} s, but the closest frame of {path} is at "
        f"{closest:.4f} s, further than {TOLERANCE:g} s; the video has "
        f"{float(stream.average_rate or 0):.6g} frames per second: encode it with the rate of "
        f"meta/info.json, or correct the timestamps"
    )


def _open(path: Path, thread: int) -> Any:
    """Open a container.

    The thread is a part of the cache's key, because threads must not share a container.
    """
    import av

    return av.open(str(path))


# Open containers: the windows of an episode read the same file repeatedly.
_containers = lru_cache(maxsize=32)(_open)

# Caches of the processes from which this one was forked.
_inherited: list[Any] = []


def _leave_inherited_containers() -> None:
    """Begin a new cache in a forked process, and never close the containers of its parent.

    The threads of their decoders do not exist here, and closing one would wait for them for ever.
    """
    global _containers
    _inherited.append(_containers)
    _containers = lru_cache(maxsize=32)(_open)


os.register_at_fork(after_in_child=_leave_inherited_containers)
