"""Several recordings of one robot, read as one."""

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
from wam_policy.data.lerobot_reader import Episode, LeRobotDataset
from wam_policy.errors import ConfigError, DatasetError
from wam_policy.hub.download import DATASET_PATTERNS, DownloadOptions, resolve_folder
from wam_policy.wrappers.action import ActionMap

T = TypeVar("T")
IMAGES = "observation.images."


class Mixture:
    """Recordings one after the other; rows and episodes are counted through."""

    def __init__(
        self,
        places: Sequence[str | Path | LeRobotDataset],
        camera_map: Mapping[str, str] | None = None,
    ) -> None:
        """Read everything but the frames.

        Args:
            places: folders, Hub ids (what is not on this machine is downloaded) or datasets that are read already.
            camera_map: camera name -> feature; of others the feature is the one of that name, or of an alias.

        Raises:
            DatasetError: one is broken, or they differ in their vectors' names.
            CheckpointError: one is no folder, and can't be downloaded.
        """
        self.parts = [_load_dataset(place) for place in places]
        first = self.parts[0]
        self.folder, self.names, self.camera_map = first.folder, first.names, dict(camera_map or {})
        for part in self.parts[1:]:
            if part.names != first.names:
                raise DatasetError(
                    f"{part.folder} has the vectors {part.names}, {first.folder} has {first.names}"
                )
            if part.fps != first.fps:
                raise DatasetError(
                    f"{part.folder} has {part.fps:g} frames a second, {first.folder} has {first.fps:g}"
                )
        self.offsets = np.cumsum([0, *(part.length for part in self.parts)])
        self.length = int(self.offsets[-1])
        pairs = [
            (part, int(offset)) for part, offset in zip(self.parts, self.offsets, strict=False)
        ]
        self.episodes = [
            dataclasses.replace(episode, start=episode.start + offset, stop=episode.stop + offset)
            for part, offset in pairs
            for episode in part.episodes
        ]

    def dataset_of(self, rows: np.ndarray) -> np.ndarray:
        """Which recording each row is of."""
        return np.searchsorted(self.offsets, rows, side="right") - 1

    def fingerprint(self) -> str:
        """SHA-256 over what the recordings say of themselves."""
        return hashlib.sha256("".join(part.sha256 for part in self.parts).encode()).hexdigest()

    def instructions(self) -> list[str]:
        """The sentence that belongs to each frame."""
        return [sentence for part in self.parts for sentence in part.instructions()]

    def vector(self, key: str) -> np.ndarray:
        """A feature of every frame, float32 [frames, numbers]."""
        return np.concatenate([part.vector(key) for part in self.parts])

    def columns(self, key: str, names: Sequence[str]) -> np.ndarray:
        """Some numbers of a feature, by name, float32 [frames, len(names)]."""
        return np.concatenate([part.columns(key, names) for part in self.parts])

    @property
    def has_action_layout(self) -> bool:
        """Whether every recording declares what its actions mean."""
        return all(part.has_action_layout for part in self.parts)

    def actions(self, layout: ActionLayout) -> np.ndarray:
        """The recorded actions in a layout, float32 [frames, A]; numbers that no layout is declared for are taken as they are.

        Raises:
            ActionError: the recorded actions can't be mapped onto the layout.
        """
        return np.concatenate([_mapped_actions(part, layout) for part in self.parts])

    def action_layout(self) -> ActionLayout:
        """What the recorded actions mean.

        Raises:
            DatasetError: one doesn't say, or they differ.
        """
        return self._agreed("actions", [part.action_layout() for part in self.parts])

    def camera_feature(self, camera: str, part: LeRobotDataset) -> str:
        """The feature of a recording that holds a camera's pictures.

        Raises:
            DatasetError: there is none, or several might be it.
        """
        if camera in self.camera_map:
            return self.camera_map[camera]
        names = {key.removeprefix(IMAGES): key for key in part.cameras}
        try:
            found = find_camera(camera, names)
        except ConfigError as error:
            raise DatasetError(
                f"{part.folder}: {error}; say it with --camera-map {camera} {IMAGES}…"
            ) from error
        if found is None:
            example = part.cameras[0] if part.cameras else IMAGES + camera
            raise DatasetError(
                f"{part.folder} has no camera {camera!r}; it has {part.cameras}: name these with --cameras, or say "
                f"where it is, --camera-map {camera} {example}"
            )
        return names[found]

    def picture_size(self, camera: str) -> tuple[int, int]:
        """Height and width of one camera's pictures.

        Raises:
            DatasetError: one has no such camera, or they differ.
        """
        return self._agreed(
            camera, [part.picture_size(self.camera_feature(camera, part)) for part in self.parts]
        )

    def _agreed(self, what: str, found: Sequence[T]) -> T:
        for part, value in zip(self.parts, found, strict=True):
            if value != found[0]:
                raise DatasetError(
                    f"{part.folder}: {what} {value}, but {found[0]} in {self.folder}"
                )
        return found[0]

    def pictures(
        self, camera: str, episode: Episode, rows: Sequence[int] | np.ndarray
    ) -> np.ndarray:
        """One camera's pictures in some rows of an episode, rising, uint8 [len(rows), H, W, 3]."""
        part = self.parts[int(self.dataset_of(np.array(episode.start)))]
        return part.pictures(self.camera_feature(camera, part), episode, rows)


def _load_dataset(source: str | Path | LeRobotDataset) -> LeRobotDataset:
    if isinstance(source, LeRobotDataset):
        return source
    folder = resolve_folder(source, DownloadOptions(), DATASET_PATTERNS, "dataset")
    return LeRobotDataset(folder)


def _mapped_actions(dataset: LeRobotDataset, layout: ActionLayout) -> np.ndarray:
    """The actions of one recording in a layout, float32 [frames, A]."""
    actions = dataset.vector("action")
    if not dataset.has_action_layout:
        return actions

    # The mapping's arithmetic rounds: actions that are in the layout already must stay what they are to the bit.
    recorded = dataset.action_layout()
    if recorded == layout:
        return actions

    unbounded = spaces.Box(-np.inf, np.inf, (layout.dim,), np.float32)
    return ActionMap(recorded, layout, unbounded)(actions)
