"""Windows of a recording as samples for anybody's `torch.utils.data.DataLoader`, in the robot's units."""

# T actions in a chunk, F pixel frames of a clip, H W pixels, A numbers per action, P numbers of state

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium import spaces
from torch.utils.data import Dataset

from wam_policy.data.lerobot_reader import LeRobotDataset
from wam_policy.data.windows import make_windows, padded_actions
from wam_policy.observation import IMAGE
from wam_policy.wrappers.action import ActionMap

if TYPE_CHECKING:
    from collections.abc import Mapping

    from wam_policy.config import PolicyConfig


class WindowDataset(Dataset[dict[str, Any]]):
    """What `WAMPolicy.training_step` takes, a window at a time; only the frames of a window are decoded."""

    def __init__(
        self,
        recording: LeRobotDataset,
        config: PolicyConfig,
        *,
        window_stride: int = 1,
        cameras: Mapping[str, str] | None = None,
    ) -> None:
        """Cut a recording into windows.

        Args:
            recording: the recording.
            spec: the contract of the policy to be trained: cameras, frames, horizon, state.
            every: a window begins at every so many rows.
            cameras: camera of the policy -> feature of the recording; the default is "observation.images.<camera>".

        Raises:
            DatasetError: the recording lacks a camera or the state, or doesn't say what its actions mean.
            ActionError: they can't be mapped onto the policy's.
        """
        self.recording, self.config = recording, config
        self.cameras = {
            name: (cameras or {}).get(name, f"observation.images.{name}")
            for name in config.cameras.names
        }
        for feature in self.cameras.values():
            recording.picture_size(feature)
        recorded, layout = recording.action_layout(), config.action.layout
        onto = ActionMap(recorded, layout, spaces.Box(-np.inf, np.inf, (layout.dim,), np.float32))
        self.windows = make_windows(
            recording.episodes,
            horizon=config.action.horizon,
            frames=config.video.frames,
            frame_stride=config.video.stride,
            window_stride=window_stride,
        )
        self._actions = onto(padded_actions(recording.vector("action"), self.windows, recorded))
        self._state = (
            None
            if config.state is None
            else recording.columns("observation.state", config.state.names)
        )
        self._instructions = recording.instructions()

    def __len__(self) -> int:
        return len(self.windows.start)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """`images.<camera>` uint8 [F, H, W, 3], `state` [P], `action` [T, A], `action_is_pad` [T], `frame_is_pad` [F], …"""
        windows, row = self.windows, self.windows.start[i]
        episode, rows = self.recording.episodes[windows.episode[i]], windows.frame_rows[i]
        sample: dict[str, Any] = {
            IMAGE + name: torch.from_numpy(self.recording.pictures(feature, episode, rows))
            for name, feature in self.cameras.items()
        }
        if self._state is not None:
            sample["state"] = torch.from_numpy(self._state[row])
        return sample | {
            "action": torch.from_numpy(self._actions[i]),
            "action_is_pad": torch.from_numpy(windows.action_is_pad[i]),
            "frame_is_pad": torch.from_numpy(windows.frame_is_pad[i]),
            "instruction": self._instructions[row],
        }
