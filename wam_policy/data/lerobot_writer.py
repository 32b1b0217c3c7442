"""Writes episodes as a LeRobot dataset v3.0: parquet tables, one video per camera, statistics.

Layout: https://github.com/huggingface/lerobot (`docs/source/lerobot-dataset-v3.mdx`). The folder appears when it is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np

from wam_policy.contract import ActionLayout
from wam_policy.data.lerobot_reader import CONTRACT_PATH, pa, pq
from wam_policy.errors import DatasetError

VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
_INDEX_COLUMNS = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}


class LeRobotWriter:
    """Collects episodes and writes them as one LeRobot v3.0 folder.

    Use it as a context manager: leaving it normally moves the finished folder into place, leaving it by an exception removes
    what was begun. Videos are lossless H.264 (yuv444p), so small bright things survive.
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
        """Begin a dataset.

        Args:
            folder: where the dataset will stand; must not exist.
            fps: frames per second of the recording.
            robot_type: stored in `meta/info.json`.
            cameras: feature key ("observation.images.front") -> (height, width).
            vectors: feature key ("action", "observation.state") -> names of its numbers.
            action: what the actions mean; kept in `meta/wam_contract.json`.
        """
        self.folder = Path(folder)
        if self.folder.exists():
            raise DatasetError(f"{self.folder} exists; choose another folder or remove it")
        self._work = self.folder.with_name(self.folder.name + ".partial")
        shutil.rmtree(self._work, ignore_errors=True)
        self.fps, self.robot_type = fps, robot_type
        self.cameras, self.vectors = (
            dict(cameras),
            {key: list(names) for key, names in vectors.items()},
        )
        self.action = action
        self._frames: dict[str, list[Any]] = {key: [] for key in (*self.vectors, *_INDEX_COLUMNS)}
        self._episodes: list[dict[str, Any]] = []
        self._tasks: dict[str, int] = {}
        self._pixels: dict[str, _PixelStatistics] = {
            key: _PixelStatistics() for key in self.cameras
        }
        self._videos = {key: self._open_video(key, *size) for key, size in self.cameras.items()}

    def _open_video(self, key: str, height: int, width: int) -> tuple[Any, Any]:
        path = self._work / VIDEO_PATH.format(video_key=key, chunk_index=0, file_index=0)
        path.parent.mkdir(parents=True)
        container = av.open(str(path), "w")
        stream = container.add_stream(
            "libx264", rate=self.fps, options={"qp": "0", "g": "20", "preset": "veryfast"}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv444p"
        stream.time_base = Fraction(1, self.fps)
        return container, stream

    def add_episode(
        self, task: str, images: Mapping[str, np.ndarray], vectors: Mapping[str, np.ndarray]
    ) -> None:
        """Append one episode.

        Args:
            task: its instruction.
            images: camera key -> uint8 [T, H, W, 3].
            vectors: feature key -> float [T, numbers].

        Raises:
            DatasetError: a feature is missing, or lengths or shapes disagree.
        """
        arrays = {**images, **vectors}
        lengths = {key: len(value) for key, value in arrays.items()}
        if (
            set(arrays) != {*self.cameras, *self.vectors}
            or len(set(lengths.values())) != 1
            or 0 in lengths.values()
        ):
            raise DatasetError(
                f"an episode needs {sorted({*self.cameras, *self.vectors})} of one length, got {lengths}"
            )
        for key, (height, width) in self.cameras.items():
            if images[key].shape[1:] != (height, width, 3) or images[key].dtype != np.uint8:
                raise DatasetError(
                    f"{key}: expected uint8 [T, {height}, {width}, 3], got {images[key].dtype} {list(images[key].shape)}"
                )
        for key, names in self.vectors.items():
            if vectors[key].shape[1:] != (len(names),) or not np.isfinite(vectors[key]).all():
                raise DatasetError(
                    f"{key}: expected finite [T, {len(names)}], got {list(vectors[key].shape)}"
                )
        length, start = next(iter(lengths.values())), len(self._frames["index"])
        task_index = self._tasks.setdefault(task, len(self._tasks))
        for key in self.vectors:
            self._frames[key].extend(np.asarray(vectors[key], np.float32))
        self._frames["timestamp"].extend(np.arange(length, dtype=np.float32) / self.fps)
        self._frames["frame_index"].extend(range(length))
        self._frames["episode_index"].extend([len(self._episodes)] * length)
        self._frames["index"].extend(range(start, start + length))
        self._frames["task_index"].extend([task_index] * length)
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
        for key, (container, stream) in self._videos.items():
            row |= {
                f"videos/{key}/chunk_index": 0,
                f"videos/{key}/file_index": 0,
                f"videos/{key}/from_timestamp": start / self.fps,
                f"videos/{key}/to_timestamp": (start + length) / self.fps,
            }
            for i, image in enumerate(images[key]):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                frame.pts, frame.time_base = start + i, Fraction(1, self.fps)
                container.mux(stream.encode(frame))
            pixels = _PixelStatistics()
            pixels.add(images[key])
            self._pixels[key].add(images[key])
            row |= {f"stats/{key}/{name}": value for name, value in pixels.result().items()}
        for key in (*self.vectors, *_INDEX_COLUMNS):
            for name, value in _vector_statistics(self._frames[key][start:]).items():
                row[f"stats/{key}/{name}"] = value
        self._episodes.append(row)

    def close(self) -> Path:
        """Finish the files and move the folder into place."""
        if not self._episodes:
            raise DatasetError("a dataset needs at least one episode")
        for container, stream in self._videos.values():
            container.mux(stream.encode())
            container.close()
        columns: dict[str, pa.Array] = {}
        for key, dtype in _INDEX_COLUMNS.items():
            columns[key] = pa.array(self._frames[key], type=pa.from_numpy_dtype(np.dtype(dtype)))
        for key, names in self.vectors.items():
            flat = pa.array(np.concatenate(self._frames[key]), type=pa.float32())
            columns[key] = pa.FixedSizeListArray.from_arrays(flat, len(names))
        _write_table(self._work / DATA_PATH.format(chunk_index=0, file_index=0), pa.table(columns))
        _write_table(self._work / EPISODES_PATH, pa.Table.from_pylist(self._episodes))
        _write_table(self._work / "meta/tasks.parquet", _tasks_table(self._tasks))
        (self._work / "meta/stats.json").write_text(json.dumps(self._statistics(), indent=2))
        (self._work / CONTRACT_PATH).write_text(
            json.dumps({"action": asdict(self.action)}, indent=2)
        )
        (self._work / "meta/info.json").write_text(json.dumps(self._info(), indent=2))
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._work.rename(self.folder)
        return self.folder

    def _statistics(self) -> dict[str, Any]:
        statistics: dict[str, Any] = {key: pixels.result() for key, pixels in self._pixels.items()}
        for key in (*self.vectors, *_INDEX_COLUMNS):
            statistics[key] = _vector_statistics(self._frames[key])
        return statistics

    def _info(self) -> dict[str, Any]:
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
            features[key] = {"dtype": "float32", "shape": [len(names)], "names": names}
        for key, dtype in _INDEX_COLUMNS.items():
            features[key] = {"dtype": dtype, "shape": [1], "names": None}
        return {
            "codebase_version": "v3.0",
            "robot_type": self.robot_type,
            "total_episodes": len(self._episodes),
            "total_frames": len(self._frames["index"]),
            "total_tasks": len(self._tasks),
            "chunks_size": 1000,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "fps": self.fps,
            "splits": {"train": f"0:{len(self._episodes)}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH,
            "features": features,
        }

    def __enter__(self) -> LeRobotWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
            return
        for container, _ in self._videos.values():
            container.close()
        shutil.rmtree(self._work, ignore_errors=True)


class _PixelStatistics:
    """Running minimum, maximum, mean and standard deviation of each colour, in [0, 1] as LeRobot stores them."""

    def __init__(self) -> None:
        self.low, self.high = np.full(3, np.inf), np.full(3, -np.inf)
        self.total, self.square, self.pixels, self.frames = np.zeros(3), np.zeros(3), 0, 0

    def add(self, images: np.ndarray) -> None:
        x = images.reshape(-1, 3) / 255.0
        self.low, self.high = np.minimum(self.low, x.min(0)), np.maximum(self.high, x.max(0))
        self.total, self.square = self.total + x.sum(0), self.square + (x**2).sum(0)
        self.pixels, self.frames = self.pixels + len(x), self.frames + len(images)

    def result(self) -> dict[str, Any]:
        mean = self.total / self.pixels
        std = np.sqrt(np.maximum(self.square / self.pixels - mean**2, 0))
        values = {"min": self.low, "max": self.high, "mean": mean, "std": std}
        return {k: v.reshape(3, 1, 1).tolist() for k, v in values.items()} | {
            "count": [self.frames]
        }


def _vector_statistics(rows: Sequence[Any]) -> dict[str, Any]:
    """Statistics of a feature's rows, vectors or single numbers, as LeRobot stores them."""
    x = np.asarray(rows, np.float64).reshape(len(rows), -1)
    values = {"min": x.min(0), "max": x.max(0), "mean": x.mean(0), "std": x.std(0)}
    values |= {f"q{q:02d}": np.quantile(x, q / 100, axis=0) for q in (1, 10, 50, 90, 99)}
    return {name: value.tolist() for name, value in values.items()} | {"count": [len(x)]}


def _tasks_table(tasks: Mapping[str, int]) -> pa.Table:
    """The table pandas would write for a frame with the task texts as its index; LeRobot looks tasks up by that index."""
    table = pa.table(
        {"task_index": pa.array(tasks.values(), pa.int64()), "__index_level_0__": pa.array(tasks)}
    )
    column = {"field_name": None, "metadata": None}
    pandas = {
        "index_columns": ["__index_level_0__"],
        "column_indexes": [
            column | {"name": None, "pandas_type": "unicode", "numpy_type": "object"}
        ],
        "columns": [
            column
            | {
                "name": "task_index",
                "field_name": "task_index",
                "pandas_type": "int64",
                "numpy_type": "int64",
            },
            column
            | {
                "name": None,
                "field_name": "__index_level_0__",
                "pandas_type": "unicode",
                "numpy_type": "object",
            },
        ],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.0.0",
    }
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def _write_table(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="snappy")
