"""Cuts episodes into training windows: which rows each one reads, and which of them lie past the episode's end."""

# N windows, T actions in a chunk, F pixel frames

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from wam_policy.config import PolicyConfig
from wam_policy.contract import ActionLayout
from wam_policy.data.config import DataConfig
from wam_policy.data.lerobot_reader import Episode
from wam_policy.data.mixture import Mixture


class Windows(NamedTuple):
    """Row numbers of windows; rows past an episode's end repeat its last row and are marked as padding."""

    episode: np.ndarray  # int [N], position in the list of episodes
    start: np.ndarray  # int [N], row of the observation
    action_rows: np.ndarray  # int [N, T]
    action_is_pad: np.ndarray  # bool [N, T]
    frame_rows: np.ndarray  # int [N, F]
    frame_is_pad: np.ndarray  # bool [N, F]


def make_windows(
    episodes: list[Episode], *, horizon: int, frames: int, frame_stride: int, window_stride: int = 1
) -> Windows:
    """Windows that begin at every `window_stride`-th row of each episode."""
    starts = [np.arange(e.start, e.stop, window_stride) for e in episodes]
    start = np.concatenate(starts)
    episode = np.repeat(np.arange(len(episodes)), [len(s) for s in starts])
    stop = np.array([e.stop for e in episodes])[episode, None]
    actions = start[:, None] + np.arange(horizon)
    pictures = start[:, None] + np.arange(frames) * frame_stride
    return Windows(
        episode,
        start,
        np.minimum(actions, stop - 1),
        actions >= stop,
        np.minimum(pictures, stop - 1),
        pictures >= stop,
    )


def policy_windows(
    dataset: Mixture, config: PolicyConfig | DataConfig, *, window_stride: int | None = None
) -> Windows:
    """Cut a dataset into the windows that a policy is trained on.

    Args:
        dataset: Recordings to cut.
        config: The policy's contract, or the options of a run, whose horizon is (frames - 1) * frame_stride.
        window_stride: Rows from one window's start to the next; None: as a run's options say, of a policy 1.

    Returns:
        Windows over the rows of the dataset.
    """
    if isinstance(config, DataConfig):
        horizon = (config.frames - 1) * config.frame_stride
        frames = config.frames
        frame_stride = config.frame_stride
        default_stride = config.window_stride
    else:
        horizon = config.action.horizon
        frames = config.video.frames
        frame_stride = config.video.stride
        default_stride = 1

    return make_windows(
        dataset.episodes,
        horizon=horizon,
        frames=frames,
        frame_stride=frame_stride,
        window_stride=default_stride if window_stride is None else window_stride,
    )


def padded_actions(
    actions: np.ndarray, windows: Windows, layout: ActionLayout, steps: slice | int = slice(None)
) -> np.ndarray:
    """Raw actions of windows, [N, T, A], of one step [N, A]: past the end displacements are zero, others keep their last value.

    Source: spec/fastwam.md section 5.1.
    """
    chunks = actions[windows.action_rows[:, steps]]
    if layout.control.endswith("_delta"):
        moves = np.ones(layout.dim, bool)
        if layout.gripper is not None:
            moves[layout.gripper.index] = False
        chunks[windows.action_is_pad[:, steps, None] & moves] = 0
    return chunks
