"""Reads LeRobot datasets of versions 2.0, 2.1 and 3.0 from a folder with pyarrow and PyAV."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wam_policy.contract import ActionLayout
from wam_policy.data import lerobot_meta, tables, video_reader
from wam_policy.data.lerobot_meta import CONTRACT_PATH
from wam_policy.data.tables import CURE, RowError
from wam_policy.errors import ConfigError, DatasetError
from wam_policy.utils import documents, pictures
from wam_policy.utils.json_dataclass import from_plain

# Prefix of the features of cameras.
CAMERA_PREFIX = "observation.images."

# Colour planes of a frame.
_PLANES = 3


@dataclass(frozen=True)
class Episode:
    """The rows and videos of one episode."""

    index: int
    task: str  # sentence of the first row
    start: int  # first row
    stop: int  # row after the last
    # Camera feature -> video file, and the time in it at which the episode starts (seconds).
    videos: dict[str, tuple[Path, float]]


class LeRobotDataset:
    """A LeRobot folder: its episodes, its vectors in memory, its frames on request.

    Attributes:
        folder: Folder of the dataset.
        info: Contents of `meta/info.json`.
        fps: Rows per second.
        cameras: Features that are videos, or pictures in the rows.
        names: Names of the numbers of each vector, by its feature.
        episodes: Episodes in the order of their rows.
        length: Number of rows.
    """

    def __init__(self, folder: str | Path) -> None:
        """Read everything but the frames.

        Raises:
            DatasetError: The folder holds no dataset, one of an unknown version, or one whose
                parts contradict each other.
        """
        self.folder = Path(folder)
        self.info = lerobot_meta.read_info(self.folder)
        self.fps = self.info.fps
        features = self.info.features
        self.cameras = [key for key in features if features[key].dtype in ("video", "image")]
        self.names = lerobot_meta.vector_names(self.info)

        # What `meta/` says about episodes and files.
        videos = [key for key in self.cameras if features[key].dtype == "video"]
        if self.info.generation == "v2":
            described = lerobot_meta.episodes_v2(self.folder, self.info, videos)
            self._files = lerobot_meta.row_files_v2(self.folder, self.info, described)
        else:
            described = lerobot_meta.episodes_v3(self.folder, self.info, videos)
            self._files = lerobot_meta.numbered_files(self.folder, "data")

        # Rows are counted before they are read.
        counts = [tables.count_rows(file) for file in self._files]
        self._offsets = np.cumsum([0, *counts])
        self.length = int(self._offsets[-1])
        self._check_lengths(described)

        columns = ["episode_index", "task_index", "timestamp", *self.names]
        self._tables = [tables.read_table(file, columns) for file in self._files]
        self._task_index = self._integers("task_index")
        self._tasks = lerobot_meta.read_tasks(self.folder, self.info)
        self.episodes = self._make_episodes(described)

    def _check_lengths(self, described: Sequence[lerobot_meta.EpisodeInfo]) -> None:
        """Check that rows, `info.json` and episodes have one length."""
        expected = self.info.total_frames
        if self.length != expected:
            raise DatasetError(
                f"{self.folder}: info.json states {expected} frames, found {self.length}; {CURE}"
            )
        episodes = self.info.total_episodes
        if episodes is not None and episodes != len(described):
            raise DatasetError(
                f"{self.folder}: info.json states {episodes} episodes, "
                f"found {len(described)}; {CURE}"
            )
        for episode in described:
            if episode.length < 1:
                raise DatasetError(
                    f"{self.folder}: episode {episode.index} has {episode.length} frames; {CURE}"
                )
        if sum(episode.length for episode in described) != self.length:
            raise DatasetError(
                f"{self.folder}: the lengths of the episodes do not add up to its "
                f"{self.length} frames; {CURE}"
            )

    def _make_episodes(self, described: Sequence[lerobot_meta.EpisodeInfo]) -> list[Episode]:
        """Return the episodes, after a check that the rows are theirs."""
        episode_index = self._integers("episode_index")
        episodes = []
        start = 0
        for one in described:
            stop = start + one.length
            if (episode_index[start:stop] != one.index).any():
                raise DatasetError(
                    f"{self.folder}: rows {start} to {stop} are not those of episode {one.index}; "
                    f"{CURE}"
                )
            # An unknown task is reported by `instructions`, which name it.
            task = self._tasks.get(int(self._task_index[start]), "")
            episodes.append(Episode(one.index, task, start, stop, one.videos))
            start = stop
        return episodes

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 over the names and contents of all files in `meta/`, `data/` and `videos/`.

        Raises:
            DatasetError: A file cannot be read.
        """
        digest = hashlib.sha256()
        for name, path in _dataset_files(self.folder):
            digest.update(f"{name}\0".encode(errors="surrogateescape"))
            try:
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise DatasetError(f"{path} cannot be read ({error}); {CURE}") from error
        return digest.hexdigest()

    def instructions(self) -> list[str]:
        """Return the instruction of every row.

        Raises:
            DatasetError: A row refers to a task without text.
        """
        task_index = self._task_index.tolist()
        unknown = set(task_index) - self._tasks.keys()
        if unknown:
            raise DatasetError(
                f"{self.folder}: task {min(unknown)} has no text; "
                f"add it to the table of tasks in meta/"
            )
        return [self._tasks[index] for index in task_index]

    @property
    def has_action_layout(self) -> bool:
        """Whether `meta/wam_contract.json` declares what the recorded actions mean."""
        return (self.folder / CONTRACT_PATH).is_file()

    def action_layout(self) -> ActionLayout:
        """Return the layout of the recorded actions, from `meta/wam_contract.json`.

        Raises:
            DatasetError: The dataset does not declare it, or not correctly.
        """
        if not self.has_action_layout:
            raise DatasetError(
                f"{self.folder} does not declare what its actions mean; write {CONTRACT_PATH}: "
                f'{{"action": {{"names": […], "control": "end_effector_delta", '
                f'"gripper": {{"index": 6, "open": 1.0, "closed": 0.0}}}}}}'
            )
        path = self.folder / CONTRACT_PATH
        contract = documents.read_json_object(path, DatasetError, "correct the contract")
        try:
            return from_plain(ActionLayout, contract.get("action"), "action")
        except ConfigError as error:
            raise DatasetError(f"{path} is not a contract ({error}); correct it") from error

    def vector(self, key: str) -> np.ndarray:
        """Return a feature of every row, float32 [rows, numbers].

        Raises:
            DatasetError: There is no such feature, or a value is missing, not finite, or no number;
                the message gives its episode and frame.
        """
        if key not in self.names:
            dtype = self.info.features[key].dtype if key in self.info.features else None
            problem = "no feature" if dtype is None else f"no vector (its dtype is {dtype!r})"
            raise DatasetError(f"{self.folder} has {problem} {key!r}; it has {sorted(self.names)}")

        size = len(self.names[key])
        parts = []
        for file, table, offset in self._parts():
            try:
                parts.append(tables.vector_column(table[key], size))
            except RowError as error:
                raise self._bad_row(key, offset + error.row, str(error)) from error
            except TypeError as error:
                raise DatasetError(f"{file}: {key} {error}; {CURE}") from error
        values = np.concatenate(parts)

        not_finite = np.flatnonzero(~np.isfinite(values).all(1))
        if len(not_finite):
            raise self._bad_row(key, int(not_finite[0]), "is not finite")
        return values

    def _integers(self, name: str) -> np.ndarray:
        """Return a column of integers of all rows, int64 [rows]."""
        return np.concatenate(
            [tables.integer_column(file, table, name) for file, table, _ in self._parts()]
        )

    def _parts(self) -> Iterator[tuple[Path, Any, int]]:
        """Yield the file, the table and the first row of each part of the rows."""
        yield from zip(self._files, self._tables, self._offsets.tolist(), strict=False)

    def _bad_row(self, key: str, row: int, problem: str) -> DatasetError:
        """Return the error of a value that cannot be used, with its episode and frame."""
        episode = next(one for one in self.episodes if one.start <= row < one.stop)
        frame = row - episode.start
        return DatasetError(
            f"{self.folder}: {key} {problem} in episode {episode.index}, frame {frame}; "
            f"remove the episode or correct the value"
        )

    @functools.cached_property
    def _timestamps(self) -> np.ndarray:
        """Time of every row in its episode in seconds, float64 [rows]."""
        parts = []
        for file, table, _ in self._parts():
            try:
                parts.append(tables.vector_column(table["timestamp"], 1)[:, 0])
            except (RowError, TypeError) as error:
                raise DatasetError(f"{file}: timestamp {error}; {CURE}") from error
        return np.concatenate(parts).astype(np.float64)

    def read_frames(
        self, key: str, episode: Episode, rows: Sequence[int] | np.ndarray
    ) -> np.ndarray:
        """Return a camera's frames at some rows of an episode; no others are kept in memory.

        A row's frame is the one at its `timestamp`, within `video_reader.TOLERANCE`.

        Args:
            key: Feature of the camera.
            episode: Episode of this dataset.
            rows: Rows within the episode, in ascending order.

        Returns:
            Frames uint8 [len(rows), H, W, 3].

        Raises:
            DatasetError: There is no such camera, a row is not of this episode, or the frames are
                damaged, missing or at other times; the message names the episode.
        """
        self._check_camera(key)
        first = int(rows[0]) - episode.start
        last = int(rows[-1]) - episode.start
        where = f"{self.folder}, episode {episode.index}, frames {first} to {last}"
        if first < 0 or last >= episode.stop - episode.start:
            length = episode.stop - episode.start
            raise DatasetError(f"{where}: the episode has the frames 0 to {length - 1}")
        try:
            if key not in episode.videos:
                return self._pictures(key, rows)
            path, start_time = episode.videos[key]
            times = self._timestamps[np.asarray(rows)] + start_time
            if not np.isfinite(times).all() or (np.diff(times) < 0).any():
                raise DatasetError("the timestamps of the rows are not in ascending order")
            return video_reader.read_frames(path, times.tolist())
        except DatasetError as error:
            raise DatasetError(f"{where}: {error}") from error

    def _pictures(self, key: str, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the pictures that stand in some rows, uint8 [len(rows), H, W, 3]."""
        frames = []
        for row in rows:
            index = int(np.searchsorted(self._offsets, int(row), side="right")) - 1
            file = self._files[index]
            picture = tables.picture_column(file, key)[int(row) - int(self._offsets[index])]
            content = picture.as_py()
            data = content.get("bytes") if isinstance(content, dict) else content
            if not isinstance(data, bytes):
                raise DatasetError(
                    f"{file}: {key} holds no picture, but {content!r:.100}; write it with the "
                    f"pictures embedded, or with videos (`use_videos=True`)"
                )
            frames.append(pictures.read_picture(data, f"{file}, {key}", DatasetError))
        if len({frame.shape for frame in frames}) > 1:
            raise DatasetError(f"the pictures of {key} have several sizes; scale them to one")
        return np.stack(frames)

    def _check_camera(self, key: str) -> None:
        """Check that a feature is a camera."""
        if key not in self.cameras:
            raise DatasetError(f"{self.folder} has no camera {key!r}; it has {self.cameras}")

    def frame_size(self, key: str) -> tuple[int, int]:
        """Return height and width of a camera's frames, in pixels.

        The declared shape may have the planes first or last; where it does not tell, the first
        frame does.

        Raises:
            DatasetError: There is no such camera, or its frames are not in colour.
        """
        self._check_camera(key)
        shape = self.info.features[key].shape
        places = [i for i, size in enumerate(shape) if size == _PLANES]
        if len(shape) == 3 and places == [0]:
            return shape[1], shape[2]
        if len(shape) == 3 and places == [2]:
            return shape[0], shape[1]
        if len(shape) != 3 or not places:
            raise DatasetError(
                f"{self.folder}: meta/info.json declares {list(shape)} as the shape of {key!r}, "
                f"expected height, width and {_PLANES} planes of colour"
            )
        episode = self.episodes[0]
        frame = self.read_frames(key, episode, [episode.start])[0]
        return frame.shape[0], frame.shape[1]

    def read_all_frames(self, key: str) -> np.ndarray:
        """Decode all frames of a camera into memory, uint8 [rows, H, W, 3]."""
        frames = []
        for episode in self.episodes:
            rows = np.arange(episode.start, episode.stop)
            frames.append(self.read_frames(key, episode, rows))
        return np.concatenate(frames)


def _dataset_files(folder: Path) -> list[tuple[str, Path]]:
    """Return the names and paths of a dataset's files in order; links are followed.

    Raises:
        DatasetError: There is none, or a folder holds itself.
    """
    files = []
    for kind in ("meta", "data", "videos"):
        for path in _walk(folder / kind, frozenset()):
            files.append((path.relative_to(folder).as_posix(), path))
    if not files:
        raise DatasetError(f"{folder} holds no file in meta/, data/ or videos/; {CURE}")
    return sorted(files)


def _walk(folder: Path, parents: frozenset[Path]) -> Iterator[Path]:
    """Yield the files below a folder, also behind links.

    Args:
        folder: Folder to search; it need not exist.
        parents: Folders in which it lies, with links resolved.
    """
    if not folder.is_dir():
        return
    place = folder.resolve()
    if place in parents:
        raise DatasetError(f"{folder} is a link to a folder in which it lies; remove it")
    for entry in os.scandir(folder):
        path = Path(entry.path)
        if path.is_dir():
            yield from _walk(path, parents | {place})
        else:
            yield path
