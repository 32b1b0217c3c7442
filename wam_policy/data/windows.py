"""Cuts episodes into training windows: the rows each one reads, and which of them are padding."""

# N windows, T actions in a chunk, A numbers per action, F pixel frames

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from wam_policy.config import PolicyConfig
from wam_policy.contract import ActionLayout
from wam_policy.data.config import DataConfig, resolved
from wam_policy.data.lerobot_reader import Episode
from wam_policy.data.mixture import Mixture


class Windows(NamedTuple):
    """Row numbers of windows; rows past an episode's end repeat its last row and are padding."""

    episode: np.ndarray  # int [N], position in the list of episodes
    start: np.ndarray  # int [N], row of the observation
    action_rows: np.ndarray  # int [N, T]
    action_is_pad: np.ndarray  # bool [N, T]
    frame_rows: np.ndarray  # int [N, F]
    frame_is_pad: np.ndarray  # bool [N, F]


def make_windows(
    episodes: list[Episode], *, horizon: int, frames: int, frame_stride: int, window_stride: int = 1
) -> Windows:
    """Cut episodes into windows.

    Args:
        episodes: Episodes, by their rows in the dataset.
        horizon: Actions per window, T.
        frames: Pixel frames per window, F, the observation included.
        frame_stride: Rows from one frame to the next.
        window_stride: Rows from the start of one window to the start of the next.

    Returns:
        The windows that start at every `window_stride`-th row of each episode.
    """
    # Start rows, and the episode of each.
    starts = [np.arange(episode.start, episode.stop, window_stride) for episode in episodes]
    start = np.concatenate(starts)
    windows_per_episode = [len(rows) for rows in starts]
    episode_index = np.repeat(np.arange(len(episodes)), windows_per_episode)

    # Rows at or past the end of a window's episode are padding.
    stops = np.array([episode.stop for episode in episodes])
    stop = stops[episode_index, None]
    action_rows = start[:, None] + np.arange(horizon)
    frame_rows = start[:, None] + np.arange(frames) * frame_stride
    return Windows(
        episode=episode_index,
        start=start,
        action_rows=np.minimum(action_rows, stop - 1),
        action_is_pad=action_rows >= stop,
        frame_rows=np.minimum(frame_rows, stop - 1),
        frame_is_pad=frame_rows >= stop,
    )


def policy_windows(
    dataset: Mixture, config: PolicyConfig | DataConfig, *, window_stride: int | None = None
) -> Windows:
    """Cut a dataset into the windows that a policy is trained on.

    Args:
        dataset: Dataset to cut.
        config: Contract of the policy, or options of a run, whose horizon follows from its frames.
        window_stride: Rows from the start of one window to the start of the next. None: as the
            options of the run say, and 1 for a contract.

    Returns:
        Windows over the rows of the dataset.
    """
    if isinstance(config, DataConfig):
        frames = resolved(config.frames)
        frame_stride = resolved(config.frame_stride)
        horizon = (frames - 1) * frame_stride
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
    """Return the actions of windows, in the robot's units.

    Past the end of an episode displacements are zero: the robot stands still. Absolute numbers and
    the gripper keep their last value. See docs/method.md, "Data and normalisation".

    Args:
        actions: Actions of every row, float32 [rows, A].
        windows: Windows over those rows.
        layout: What the actions mean.
        steps: Steps of each chunk to return.

    Returns:
        Actions [N, T, A], or [N, A] if `steps` is a single step.
    """
    chunks = actions[windows.action_rows[:, steps]]
    if layout.control.endswith("_delta"):
        is_displacement = np.ones(layout.dim, bool)
        if layout.gripper is not None:
            is_displacement[layout.gripper.index] = False
        chunks[windows.action_is_pad[:, steps, None] & is_displacement] = 0
    return chunks
