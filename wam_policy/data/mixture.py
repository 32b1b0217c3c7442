"""Several LeRobot datasets of one robot, read as one dataset."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from gymnasium import spaces

from wam_policy.cameras import find_camera
from wam_policy.contract import ActionLayout
from wam_policy.data.config import ACTION_KEY, STATE_KEY, DataConfig
from wam_policy.data.lerobot_reader import CAMERA_PREFIX, Episode, LeRobotDataset
from wam_policy.errors import ConfigError, DatasetError
from wam_policy.hub.download import DATASET_PATTERNS, DownloadOptions, resolve_folder
from wam_policy.wrappers.action import ActionMap

T = TypeVar("T")


class Mixture:
    """Datasets one after the other, with rows and episodes numbered continuously.

    Attributes:
        datasets: The datasets.
        folder: Folder of the first dataset, for messages.
        camera_map: Feature of each camera that is not looked up by its name.
        state_key: Features whose numbers, one after the other, are the state.
        action_key: Features whose numbers, one after the other, are an action.
        offsets: First row of each dataset, and the row after the last one.
        length: Rows of all datasets.
        episodes: Episodes of all datasets, by their rows in the mixture.
    """

    def __init__(
        self,
        sources: Sequence[str | Path | LeRobotDataset],
        camera_map: Mapping[str, str] | None = None,
        *,
        state_key: Sequence[str] = STATE_KEY,
        action_key: Sequence[str] = ACTION_KEY,
    ) -> None:
        """Read everything but the video frames.

        Args:
            sources: Folders, Hub ids (downloaded if they are not in the cache) or datasets that are
                already read.
            camera_map: Feature by camera name. A camera that is not named here is looked up by its
                name, then by its aliases.
            state_key: Features whose numbers, one after the other, are the state.
            action_key: Features whose numbers, one after the other, are an action.

        Raises:
            DatasetError: A dataset is broken, or the datasets differ in frame rate or in the names
                of the numbers of state and action.
            CheckpointError: A source is not a folder and cannot be downloaded.
        """
        self.datasets = [_load_dataset(source) for source in sources]
        if not self.datasets:
            raise DatasetError("no dataset is given: name at least one with --dataset")
        self.state_key = tuple(state_key)
        self.action_key = tuple(action_key)
        self.camera_map = dict(camera_map or {})
        first = self.datasets[0]
        self.folder = first.folder
        for dataset in self.datasets[1:]:
            for key in (*self.state_key, *self.action_key):
                _check_same_names(first, dataset, key)
            _check_same_rate(first, dataset)

        # Episodes, with their rows shifted by the rows of the datasets before.
        self.episodes: list[Episode] = []
        offsets = [0]
        for dataset in self.datasets:
            first_row = offsets[-1]
            for episode in dataset.episodes:
                shifted = dataclasses.replace(
                    episode,
                    start=episode.start + first_row,
                    stop=episode.stop + first_row,
                )
                self.episodes.append(shifted)
            offsets.append(first_row + dataset.length)
        self.offsets = np.array(offsets)
        self.length = offsets[-1]

    def dataset_index(self, rows: np.ndarray) -> np.ndarray:
        """Return the index of the dataset that each row belongs to, int, shaped like `rows`."""
        return np.searchsorted(self.offsets, rows, side="right") - 1

    def fingerprint(self) -> str:
        """Return the SHA-256 over the fingerprints of the datasets."""
        digests = [dataset.sha256 for dataset in self.datasets]
        # The features are hashed only if they are not the usual ones, so that files written before
        # these options existed stay valid.
        if (self.state_key, self.action_key) != (STATE_KEY, ACTION_KEY):
            digests.append(repr((self.state_key, self.action_key)))
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    def instructions(self) -> list[str]:
        """Return the instruction of every row."""
        return [instruction for dataset in self.datasets for instruction in dataset.instructions()]

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the numbers of the state.

        Raises:
            DatasetError: The datasets do not have the features of the state.
        """
        return _joined_names(self.datasets[0], self.state_key, "--state-key")

    @property
    def action_names(self) -> tuple[str, ...]:
        """Names of the numbers of an action.

        Raises:
            DatasetError: The datasets do not have the features of the actions.
        """
        return _joined_names(self.datasets[0], self.action_key, "--action-key")

    def states(self, names: Sequence[str] | None = None) -> np.ndarray:
        """Return the state of every row, float32 [rows, P].

        Args:
            names: Names of the numbers, in the order to return them in; None for all.

        Raises:
            DatasetError: The datasets have no state, it lacks one of the numbers, or a value is
                missing or not finite.
        """
        available = self.state_names
        states = np.concatenate(
            [_joined_vectors(dataset, self.state_key) for dataset in self.datasets]
        )
        if names is None:
            return states
        missing = [name for name in names if name not in available]
        if missing:
            raise DatasetError(
                f"{self.folder}: the state ({', '.join(self.state_key)}) has no {missing}; "
                f"it has {list(available)}"
            )
        return states[:, [available.index(name) for name in names]]

    def action_layout(self) -> ActionLayout:
        """Return the layout of the recorded actions.

        Raises:
            DatasetError: A dataset does not declare it, or the datasets declare different ones.
        """
        layouts = [dataset.action_layout() for dataset in self.datasets]
        return self._common_value("actions", layouts)

    def actions(self, layout: ActionLayout) -> np.ndarray:
        """Return the recorded actions in a layout.

        Args:
            layout: What the returned actions mean. A dataset that declares no layout is assumed to
                be recorded in this one.

        Returns:
            Actions float32 [rows, A], in the robot's units. They are the recorded ones, bit for
            bit, where these are in the layout already.

        Raises:
            ActionError: The recorded actions cannot be mapped onto the layout.
        """
        parts = []
        for dataset in self.datasets:
            _joined_names(dataset, self.action_key, "--action-key")
            actions = _joined_vectors(dataset, self.action_key)
            parts.append(_mapped_actions(actions, dataset, layout))
        return np.concatenate(parts)

    def camera_feature(self, camera: str, dataset: LeRobotDataset) -> str:
        """Return the feature of a dataset that holds a camera's frames.

        Args:
            camera: Name of the camera.
            dataset: Dataset to look in.

        Raises:
            DatasetError: The dataset has no such camera, or several that the name may mean.
        """
        if camera in self.camera_map:
            return self.camera_map[camera]

        # Short names of the dataset's cameras, among which the name or an alias is looked up.
        features = {feature.removeprefix(CAMERA_PREFIX): feature for feature in dataset.cameras}
        try:
            name = find_camera(camera, features)
        except ConfigError as error:
            raise DatasetError(
                f"{dataset.folder}: {error}; "
                f"name its feature with --camera-map {camera} {CAMERA_PREFIX}…"
            ) from error
        if name is None:
            example = dataset.cameras[0] if dataset.cameras else CAMERA_PREFIX + camera
            raise DatasetError(
                f"{dataset.folder} has no camera {camera!r}; it has {dataset.cameras}: "
                f"select these with --cameras, "
                f"or name the feature of {camera!r} with --camera-map {camera} {example}"
            )
        return features[name]

    def frame_size(self, camera: str) -> tuple[int, int]:
        """Return height and width of a camera's frames, in pixels.

        Raises:
            DatasetError: A dataset has no such camera, or the sizes differ.
        """
        sizes = []
        for dataset in self.datasets:
            feature = self.camera_feature(camera, dataset)
            sizes.append(dataset.frame_size(feature))
        return self._common_value(camera, sizes)

    def read_frames(
        self, camera: str, episode: Episode, rows: Sequence[int] | np.ndarray
    ) -> np.ndarray:
        """Return a camera's frames at some rows of an episode.

        Args:
            camera: Name of the camera.
            episode: Episode of this mixture.
            rows: Rows of the mixture within the episode, in ascending order.

        Returns:
            Frames uint8 [len(rows), H, W, 3].
        """
        index = int(self.dataset_index(np.array(episode.start)))
        dataset = self.datasets[index]
        feature = self.camera_feature(camera, dataset)

        # The dataset counts its own rows.
        shift = int(self.offsets[index])
        own_episode = dataclasses.replace(
            episode, start=episode.start - shift, stop=episode.stop - shift
        )
        return dataset.read_frames(feature, own_episode, np.asarray(rows) - shift)

    def _common_value(self, what: str, values: Sequence[T]) -> T:
        """Return the value that all datasets have, and raise a DatasetError if they differ."""
        first = values[0]
        for dataset, value in zip(self.datasets, values, strict=True):
            if value != first:
                raise DatasetError(
                    f"{dataset.folder}: {what} {value}, "
                    f"but {first} in {self.folder}; train on them separately"
                )
        return first


def open_datasets(config: DataConfig) -> Mixture:
    """Return the datasets that the options of a run name.

    Raises:
        DatasetError: See `Mixture`.
        CheckpointError: See `Mixture`.
    """
    return Mixture(
        config.dataset,
        config.camera_map,
        state_key=config.state_key,
        action_key=config.action_key,
    )


def _load_dataset(source: str | Path | LeRobotDataset) -> LeRobotDataset:
    if isinstance(source, LeRobotDataset):
        return source
    folder = resolve_folder(source, DownloadOptions(), DATASET_PATTERNS, "dataset")
    return LeRobotDataset(folder)


def _joined_names(dataset: LeRobotDataset, keys: Sequence[str], option: str) -> tuple[str, ...]:
    """Return the names of the numbers of some features, one feature after the other.

    Args:
        dataset: Dataset that has the features.
        keys: Features.
        option: Option that names the features, for the message.

    Raises:
        DatasetError: There is no such feature.
    """
    names = []
    for key in keys:
        if key not in dataset.names:
            available = sorted(dataset.names)
            raise DatasetError(
                f"{dataset.folder} has no vector {key!r}; it has {available}: "
                f"name the right ones with {option}"
            )
        names.append(dataset.names[key])
    joined = [name for group in names for name in group]
    if len(set(joined)) < len(joined):
        # Both arms may name their joints alike.
        joined = [f"{key}.{name}" for key, group in zip(keys, names, strict=True) for name in group]
    return tuple(joined)


def _joined_vectors(dataset: LeRobotDataset, keys: Sequence[str]) -> np.ndarray:
    """Return the numbers of some features of every row, one feature after the other."""
    return np.concatenate([dataset.vector(key) for key in keys], axis=1)


def _check_same_names(first: LeRobotDataset, other: LeRobotDataset, key: str) -> None:
    """Check that two datasets name the numbers of a feature alike."""
    names = other.names.get(key)
    expected = first.names.get(key)
    if names != expected:
        raise DatasetError(
            f"{other.folder} has the numbers {names} in {key!r}, "
            f"but {first.folder} has {expected}; name them alike in meta/info.json"
        )


def _check_same_rate(first: LeRobotDataset, other: LeRobotDataset) -> None:
    """Check that two datasets have one frame rate."""
    if other.fps != first.fps:
        raise DatasetError(
            f"{other.folder} has {other.fps:g} frames per second, "
            f"but {first.folder} has {first.fps:g}; resample one of them"
        )


def _mapped_actions(
    actions: np.ndarray, dataset: LeRobotDataset, layout: ActionLayout
) -> np.ndarray:
    """Return the recorded actions of one dataset in a layout, float32 [rows, A]."""
    if not dataset.has_action_layout:
        return actions

    # The map rounds: actions that are in the layout already must keep every bit.
    recorded = dataset.action_layout()
    if recorded == layout:
        return actions

    unbounded = spaces.Box(-np.inf, np.inf, (layout.dim,), np.float32)
    return ActionMap(recorded, layout, unbounded)(actions)
