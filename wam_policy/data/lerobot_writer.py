"""Writes episodes as a LeRobot dataset v3.0: parquet tables, one video per camera, statistics.

Format: https://github.com/huggingface/lerobot, `docs/source/lerobot-dataset-v3.mdx`. The folder
appears when it is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np

from wam_policy.contract import ActionLayout
from wam_policy.data.feature_statistics import PixelStatistics, vector_statistics
from wam_policy.data.lerobot_meta import CONTRACT_PATH
from wam_policy.data.tables import pa, pq
from wam_policy.errors import CheckpointError, DatasetError
from wam_policy.utils.io import LOCK, explained_write_errors, locked, sync_tree

Arrays = Mapping[str, np.ndarray]  # by feature

VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
INFO_PATH = "meta/info.json"
EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"

# Columns that LeRobot needs beside the vectors, and their types.
_INDEX_COLUMNS = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}


class LeRobotWriter:
    """Collects episodes and writes them as one LeRobot v3.0 folder.

    Use it as a context manager: leaving it normally moves the complete folder into place, leaving
    it by an exception removes the partial one, `<folder>.partial`. What was recorded stays there if
    it cannot be completed or moved. Videos are lossless H.264 (yuv444p), so that small
    bright objects survive.

    Attributes:
        folder: Folder of the complete dataset.
        fps: Frames per second.
        robot_type: Type of the robot in `meta/info.json`.
        cameras: Height and width of each camera, by its feature.
        vectors: Names of the numbers of each vector, by its feature.
        action: What the actions mean.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        fps: int,
        robot_type: str,
        cameras: Mapping[str, tuple[int, int]],
        vectors: Mapping[str, Sequence[str]],
        action: ActionLayout,
    ) -> None:
        """Start a dataset.

        Args:
            folder: Folder of the complete dataset; it must not exist.
            fps: Frames per second of the recording.
            robot_type: Type of the robot, stored in `meta/info.json`.
            cameras: Feature ("observation.images.front") -> (height, width) in pixels.
            vectors: Feature ("action", "observation.state") -> names of its numbers.
            action: What the actions mean, stored in `meta/wam_contract.json`.

        Raises:
            DatasetError: The folder exists, another process writes it, or it cannot be written.
        """
        self.folder = Path(folder)
        if self.folder.exists():
            raise DatasetError(f"{self.folder} exists; choose another folder or remove it")
        self._partial = self.folder.with_name(self.folder.name + ".partial")
        self._lock = ExitStack()
        self._lock_partial()

        self.fps = fps
        self.robot_type = robot_type
        self.cameras = dict(cameras)
        self.vectors = {key: list(names) for key, names in vectors.items()}
        self.action = action

        # Everything but the pixels stays in memory until the dataset is closed.
        self._columns = (*self.vectors, *_INDEX_COLUMNS)
        self._rows: dict[str, list[Any]] = {key: [] for key in self._columns}
        self._episodes: list[dict[str, Any]] = []
        self._tasks: dict[str, int] = {}
        self._pixels: dict[str, PixelStatistics] = {}
        self._videos: dict[str, tuple[Any, Any]] = {}
        for key, (height, width) in self.cameras.items():
            self._pixels[key] = PixelStatistics()
            self._videos[key] = self._open_video(key, height, width)

    def _lock_partial(self) -> None:
        """Take the partial folder for this process, and remove what a killed one left there."""
        try:
            self._lock.enter_context(locked(self._partial))
        except CheckpointError as error:
            raise DatasetError(f"{self.folder} cannot be recorded: {error}") from error
        if (self._partial / INFO_PATH).is_file():
            self._lock.close()
            raise DatasetError(
                f"{self._partial} is a complete recording that could not be moved to "
                f"{self.folder}: rename it yourself, or remove it"
            )
        for name in ("data", "meta", "videos"):
            shutil.rmtree(self._partial / name, ignore_errors=True)

    def _open_video(self, key: str, height: int, width: int) -> tuple[Any, Any]:
        """Return the container and the stream of a camera's video."""
        path = self._partial / VIDEO_PATH.format(video_key=key, chunk_index=0, file_index=0)
        with explained_write_errors(self._partial, DatasetError):
            path.parent.mkdir(parents=True)
            container = av.open(str(path), "w")
        options = {"qp": "0", "g": "20", "preset": "veryfast"}
        stream = container.add_stream("libx264", rate=self.fps, options=options)
        stream.width = width
        stream.height = height
        stream.pix_fmt = "yuv444p"
        stream.time_base = Fraction(1, self.fps)
        return container, stream

    def add_episode(self, task: str, images: Arrays, vectors: Arrays) -> None:
        """Append one episode of T frames.

        Args:
            task: Instruction of the episode.
            images: Camera feature -> uint8 [T, H, W, 3].
            vectors: Vector feature -> float [T, numbers].

        Raises:
            DatasetError: A feature is missing, lengths or shapes disagree, or a number is not
                finite.
        """
        self._check_episode(images, vectors)
        arrays = [*images.values(), *vectors.values()]
        length = len(arrays[0])
        start = len(self._rows["index"])
        self._append_rows(task, vectors, start, length)

        # The episode's row in the table of episodes. There is only one file of each kind.
        row: dict[str, Any] = {
            "episode_index": len(self._episodes),
            "tasks": [task],
            "length": length,
            "dataset_from_index": start,
            "dataset_to_index": start + length,
            "data/chunk_index": 0,
            "data/file_index": 0,
            "meta/episodes/chunk_index": 0,
            "meta/episodes/file_index": 0,
        }
        for key in self.cameras:
            row |= self._append_frames(key, images[key], start)
        for key in self._columns:
            statistics = vector_statistics(self._rows[key][start:])
            row |= _with_prefix(f"stats/{key}/", statistics)
        self._episodes.append(row)

    def _check_episode(self, images: Arrays, vectors: Arrays) -> None:
        """Check that an episode has every feature, all of one length and of the declared shape."""
        features = {*self.cameras, *self.vectors}
        arrays = {**images, **vectors}
        lengths = {key: len(array) for key, array in arrays.items()}
        distinct = set(lengths.values())
        if set(lengths) != features or len(distinct) != 1 or 0 in distinct:
            raise DatasetError(
                f"an episode needs {sorted(features)} of one length, got the lengths {lengths}"
            )

        # Frames.
        for key, (height, width) in self.cameras.items():
            frames = images[key]
            expected = (height, width, 3)
            if frames.shape[1:] != expected or frames.dtype != np.uint8:
                raise DatasetError(
                    f"{key}: expected uint8 [T, {height}, {width}, 3], "
                    f"got {frames.dtype} {list(frames.shape)}"
                )

        # Vectors.
        for key, names in self.vectors.items():
            values = vectors[key]
            dim = len(names)
            if values.shape[1:] != (dim,):
                raise DatasetError(f"{key}: expected finite [T, {dim}], got {list(values.shape)}")
            if not np.isfinite(values).all():
                raise DatasetError(
                    f"{key}: expected finite [T, {dim}], got NaN or infinity; "
                    f"leave the episode out or correct the value"
                )

    def _append_rows(self, task: str, vectors: Arrays, start: int, length: int) -> None:
        """Append an episode's vectors and index columns."""
        for key in self.vectors:
            values = np.asarray(vectors[key], np.float32)
            self._rows[key].extend(values)

        # A new task gets the next index.
        task_index = self._tasks.setdefault(task, len(self._tasks))
        episode_index = len(self._episodes)
        frame_numbers = np.arange(length, dtype=np.float32)
        self._rows["timestamp"].extend(frame_numbers / self.fps)
        self._rows["frame_index"].extend(range(length))
        self._rows["episode_index"].extend([episode_index] * length)
        self._rows["index"].extend(range(start, start + length))
        self._rows["task_index"].extend([task_index] * length)

    def _append_frames(self, key: str, images: np.ndarray, start: int) -> dict[str, Any]:
        """Append an episode's frames to a camera's video.

        Args:
            key: Feature of the camera.
            images: Frames uint8 [T, H, W, 3].
            start: Number of the first frame in the video.

        Returns:
            The camera's entries in the table of episodes: place in the video, and statistics.
        """
        container, stream = self._videos[key]
        for number, image in enumerate(images, start):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts = number
            frame.time_base = Fraction(1, self.fps)
            with explained_write_errors(self._partial, DatasetError):
                container.mux(stream.encode(frame))

        # Statistics of this episode, and of the whole dataset.
        pixels = PixelStatistics()
        pixels.add(images)
        self._pixels[key].add(images)

        placement = {
            f"videos/{key}/chunk_index": 0,
            f"videos/{key}/file_index": 0,
            f"videos/{key}/from_timestamp": start / self.fps,
            f"videos/{key}/to_timestamp": (start + len(images)) / self.fps,
        }
        return placement | _with_prefix(f"stats/{key}/", pixels.result())

    def close(self) -> Path:
        """Complete the files, move the folder into place and return it.

        Raises:
            DatasetError: There is no episode, or the files cannot be written.
        """
        if not self._episodes:
            raise DatasetError(
                f"{self.folder}: a dataset needs at least one episode; call `add_episode` first"
            )
        try:
            self._write_files()
            # The lock file moves too.
            self._partial.rename(self.folder)
            (self.folder / LOCK).unlink()
        except (OSError, pa.ArrowException, av.error.FFmpegError) as error:
            raise DatasetError(
                f"{self.folder} cannot be completed ({error}); what was recorded is in "
                f"{self._partial}: free some space, or choose a folder that you may write"
            ) from error
        finally:
            self._lock.close()
        return self.folder

    def _write_files(self) -> None:
        """Complete the videos, and write tables and JSON files, `meta/info.json` last."""
        for container, stream in self._videos.values():
            container.mux(stream.encode())  # flushes the encoder
            container.close()

        # Tables.
        data_path = DATA_PATH.format(chunk_index=0, file_index=0)
        _write_table(self._partial / data_path, self._data_table())
        _write_table(self._partial / EPISODES_PATH, pa.Table.from_pylist(self._episodes))
        _write_table(self._partial / "meta/tasks.parquet", _tasks_table(self._tasks))

        # JSON files.
        _write_json(self._partial / "meta/stats.json", self._statistics())
        _write_json(self._partial / CONTRACT_PATH, {"action": asdict(self.action)})
        _write_json(self._partial / INFO_PATH, self._info())
        sync_tree(self._partial)

    def _data_table(self) -> pa.Table:
        """Return the table of all rows; vectors of several numbers are lists of fixed size."""
        columns: dict[str, pa.Array] = {}
        for key, dtype in _INDEX_COLUMNS.items():
            arrow_type = pa.from_numpy_dtype(np.dtype(dtype))
            columns[key] = pa.array(self._rows[key], type=arrow_type)
        for key, names in self.vectors.items():
            values = np.concatenate(self._rows[key])
            flat = pa.array(values, type=pa.float32())
            # LeRobot stores vectors of one number as plain numbers, and casts to that type.
            is_number = len(names) == 1
            columns[key] = (
                flat if is_number else pa.FixedSizeListArray.from_arrays(flat, len(names))
            )
        return pa.table(columns)

    def _statistics(self) -> dict[str, Any]:
        """Return the contents of `meta/stats.json`."""
        statistics: dict[str, Any] = {}
        for key, pixels in self._pixels.items():
            statistics[key] = pixels.result()
        for key in self._columns:
            statistics[key] = vector_statistics(self._rows[key])
        return statistics

    def _info(self) -> dict[str, Any]:
        """Return the contents of `meta/info.json`."""
        return {
            "codebase_version": "v3.0",
            "robot_type": self.robot_type,
            "total_episodes": len(self._episodes),
            "total_frames": len(self._rows["index"]),
            "total_tasks": len(self._tasks),
            "chunks_size": 1000,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "fps": self.fps,
            "splits": {"train": f"0:{len(self._episodes)}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH,
            "features": self._features(),
        }

    def _features(self) -> dict[str, Any]:
        """Return LeRobot's description of every feature."""
        features: dict[str, Any] = {}
        for key, (height, width) in self.cameras.items():
            video = {
                "video.height": height,
                "video.width": width,
                "video.codec": "h264",
                "video.pix_fmt": "yuv444p",
                "video.is_depth_map": False,
                "video.fps": self.fps,
                "video.channels": 3,
                "has_audio": False,
            }
            features[key] = {
                "dtype": "video",
                "shape": [height, width, 3],
                "names": ["height", "width", "channels"],
                "info": video,
            }
        for key, names in self.vectors.items():
            features[key] = {
                "dtype": "float32",
                "shape": [len(names)],
                "names": names,
            }
        for key, dtype in _INDEX_COLUMNS.items():
            features[key] = {"dtype": dtype, "shape": [1], "names": None}
        return features

    def __enter__(self) -> LeRobotWriter:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is not None or not self._episodes:
            self._discard()
        if exc_type is None:
            self.close()

    def _discard(self) -> None:
        """Close the videos and remove the partial dataset."""
        for container, _ in self._videos.values():
            # A full disk also fails here, and the error that led here is the one to report.
            with suppress(OSError, av.error.FFmpegError):
                container.close()
        shutil.rmtree(self._partial, ignore_errors=True)
        self._lock.close()


def _with_prefix(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {prefix + name: value for name, value in values.items()}


def _tasks_table(tasks: Mapping[str, int]) -> pa.Table:
    """Return the table that pandas writes for a frame with the task texts as its index.

    LeRobot reads it with pandas and looks tasks up by that index.
    """
    index = "__index_level_0__"  # pandas' name for an index without a name
    columns = {
        "task_index": pa.array(tasks.values(), pa.int64()),
        index: pa.array(tasks),
    }
    table = pa.table(columns)

    # Without this metadata pandas would take the texts for an ordinary column.
    pandas = {
        "index_columns": [index],
        "column_indexes": [_pandas_column(None, None, "unicode", "object")],
        "columns": [
            _pandas_column("task_index", "task_index", "int64", "int64"),
            _pandas_column(None, index, "unicode", "object"),
        ],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.0.0",
    }
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def _pandas_column(
    name: str | None, field_name: str | None, pandas_type: str, numpy_type: str
) -> dict[str, str | None]:
    """Return the metadata that pandas stores for a column."""
    return {
        "field_name": field_name,
        "metadata": None,
        "name": name,
        "pandas_type": pandas_type,
        "numpy_type": numpy_type,
    }


def _write_table(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="snappy", write_page_checksum=True)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
