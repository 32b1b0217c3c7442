"""Windows of a dataset for a user's own `torch.utils.data.DataLoader`, in the robot's units."""

# T actions in a chunk, F pixel frames of a clip, H W pixels, A numbers per action,
# P numbers of state

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from wam_policy.data.lerobot_reader import LeRobotDataset
from wam_policy.data.mixture import Mixture
from wam_policy.data.windows import padded_actions, policy_windows
from wam_policy.observation import IMAGE, INSTRUCTION, STATE
from wam_policy.utils.deprecation import renamed

if TYPE_CHECKING:
    from wam_policy.config import PolicyConfig


class WindowDataset(Dataset[dict[str, Any]]):
    """The samples that `WAMPolicy.training_step` takes, one window each.

    Only the frames of the requested window are decoded. Windows, cameras and actions are those that
    `wam train` uses.

    Attributes:
        dataset: Datasets that the windows are cut from.
        config: Contract of the policy.
        windows: Rows of the windows.
    """

    def __init__(
        self,
        dataset: str | Path | LeRobotDataset | Mixture,
        config: PolicyConfig,
        *,
        window_stride: int | None = None,
        cameras: Mapping[str, str] | None = None,
        every: int | None = None,
    ) -> None:
        """Cut a dataset into windows.

        Args:
            dataset: Folder or Hub id of a LeRobot dataset, or a dataset that is already read.
            config: Contract of the policy to train.
            window_stride: Rows from the start of one window to the start of the next; default: 1.
            cameras: Feature by camera of the policy. A camera that is not named here is looked up
                by its name, then by its aliases (`wam_policy.cameras`).
            every: Deprecated name of `window_stride`.

        Raises:
            DatasetError: The dataset lacks a camera or the state, or does not declare what its
                actions mean.
            ActionError: The recorded actions cannot be mapped onto the policy's.
            CheckpointError: `dataset` is not a folder and cannot be downloaded.
        """
        stride = renamed("every", every, "window_stride", window_stride) or 1
        self.config = config
        self.dataset = _as_mixture(dataset, cameras or {})

        # A missing camera or action layout is reported now, not at the first batch.
        for camera in config.cameras.names:
            self.dataset.frame_size(camera)
        for source in self.dataset.datasets:
            source.action_layout()

        # Vectors of the whole dataset fit in memory; frames are decoded on access.
        layout = config.action.layout
        actions = self.dataset.actions(layout)
        self.windows = policy_windows(self.dataset, config, window_stride=stride)
        self._actions = padded_actions(actions, self.windows, layout)
        self._instructions = self.dataset.instructions()
        self._state = None
        if config.state is not None:
            self._state = self.dataset.states(config.state.names)

    def __len__(self) -> int:
        return len(self.windows.start)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Return one window.

        Returns:
            `images.<camera>` uint8 [F, H, W, 3], `state` float32 [P] if the policy has one,
            `action` float32 [T, A], `action_is_pad` bool [T], `frame_is_pad` bool [F] and
            `instruction`.
        """
        row = self.windows.start[i]
        episode = self.dataset.episodes[self.windows.episode[i]]
        frame_rows = self.windows.frame_rows[i]

        sample: dict[str, Any] = {}
        for camera in self.config.cameras.names:
            frames = self.dataset.read_frames(camera, episode, frame_rows)
            sample[IMAGE + camera] = torch.from_numpy(frames)
        if self._state is not None:
            sample[STATE] = torch.from_numpy(self._state[row])
        sample["action"] = torch.from_numpy(self._actions[i])
        sample["action_is_pad"] = torch.from_numpy(self.windows.action_is_pad[i])
        sample["frame_is_pad"] = torch.from_numpy(self.windows.frame_is_pad[i])
        sample[INSTRUCTION] = self._instructions[row]
        return sample


def _as_mixture(
    dataset: str | Path | LeRobotDataset | Mixture,
    camera_map: Mapping[str, str],
) -> Mixture:
    """Return the dataset as a mixture that looks cameras up in `camera_map` first."""
    if not isinstance(dataset, Mixture):
        return Mixture([dataset], camera_map)
    if not camera_map:
        return dataset
    merged = {**dataset.camera_map, **camera_map}
    return Mixture(
        dataset.datasets, merged, state_key=dataset.state_key, action_key=dataset.action_key
    )
