"""Reads LeRobot datasets v3.0 from a folder with pyarrow and PyAV.

Layout: https://github.com/huggingface/lerobot (`docs/source/lerobot-dataset-v3.mdx`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wam_policy.config import from_plain
from wam_policy.contract import ActionLayout
from wam_policy.errors import DatasetError
from wam_policy.training.arrow import pa, pq

CONTRACT_PATH = "meta/wam_contract.json"  # beside LeRobot's own files, which can't say what a gripper's numbers mean


@dataclass(frozen=True)
class Episode:
    """One episode's place in the dataset."""

    index: int
    task: str
    start: int  # first row
    stop: int  # row after the last
    videos: dict[str, tuple[Path, float]]  # camera key -> file, and the time in it where the episode begins (seconds)


class LeRobotDataset:
    """A LeRobot v3.0 folder: its episodes, its vectors in memory, its frames on request."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        info_path = self.folder / "meta/info.json"
        if not info_path.is_file():
            raise DatasetError(f"{self.folder} is no LeRobot dataset: it has no meta/info.json")
        self.info: dict[str, Any] = json.loads(info_path.read_text())
        version = self.info.get("codebase_version")
        if version != "v3.0":
            raise DatasetError(f"{self.folder} is a LeRobot dataset {version}; this reader knows v3.0")
        self.fps = float(self.info["fps"])
        features = self.info["features"]
        self.cameras = [key for key, feature in features.items() if feature["dtype"] == "video"]
        self.names: dict[str, tuple[str, ...]] = {
            key: tuple(feature["names"])
            for key, feature in features.items()
            if feature["dtype"] == "float32" and feature["names"]
        }
        self._table = self._read("data", ["index", "episode_index", *self.names])
        self.length = self._table.num_rows
        if self.length != self.info["total_frames"]:
            raise DatasetError(f"{self.folder}: info.json promises {self.info['total_frames']} frames, found {self.length}")
        self.episodes = self._episodes()

    def _read(self, under: str, columns: list[str] | None = None) -> pa.Table:
        files = sorted((self.folder / under).glob("chunk-*/file-*.parquet"))
        if not files:
            raise DatasetError(f"{self.folder}/{under} holds no parquet file")
        return pa.concat_tables([pq.read_table(file, columns=columns) for file in files])

    def _episodes(self) -> list[Episode]:
        episodes = []
        for row in self._read("meta/episodes").to_pylist():
            videos = {}
            for key in self.cameras:
                place = {name: row[f"videos/{key}/{name}_index"] for name in ("chunk", "file")}
                name = self.info["video_path"].format(video_key=key, chunk_index=place["chunk"], file_index=place["file"])
                videos[key] = (self.folder / name, float(row[f"videos/{key}/from_timestamp"]))
            start, stop = row["dataset_from_index"], row["dataset_to_index"]
            episodes.append(Episode(row["episode_index"], row["tasks"][0], start, stop, videos))
        if sum(e.stop - e.start for e in episodes) != self.length:
            raise DatasetError(f"{self.folder}: the episodes' lengths don't add up to its {self.length} frames")
        return episodes

    def action_layout(self) -> ActionLayout:
        """What the recorded actions mean, from `meta/wam_contract.json`.

        Raises:
            DatasetError: the dataset doesn't say.
        """
        path = self.folder / CONTRACT_PATH
        if not path.is_file():
            raise DatasetError(
                f"{self.folder} doesn't say what its actions mean; write {CONTRACT_PATH}: "
                f'{{"action": {{"names": […], "control": "end_effector_delta", '
                f'"gripper": {{"index": 6, "open": 1.0, "closed": 0.0}}}}}}'
            )
        return from_plain(ActionLayout, json.loads(path.read_text())["action"], "action")

    def vector(self, key: str) -> np.ndarray:
        """A feature of every frame, float32 [frames, numbers].

        Raises:
            DatasetError: no such feature, or a value that isn't finite (named by episode and frame).
        """
        if key not in self.names:
            raise DatasetError(f"{self.folder} has no feature {key!r}; it has {sorted(self.names)}")
        column = self._table[key].combine_chunks()
        values = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(self.length, -1)
        bad = np.flatnonzero(~np.isfinite(values).all(1))
        if len(bad):
            episode = self._table["episode_index"][int(bad[0])].as_py()
            raise DatasetError(f"{self.folder}: {key} isn't finite in episode {episode}, row {bad[0]}")
        return values

    def picture_size(self, key: str) -> tuple[int, int]:
        """Height and width of one camera's pictures."""
        if key not in self.cameras:
            raise DatasetError(f"{self.folder} has no camera {key!r}; it has {self.cameras}")
        height, width, _ = self.info["features"][key]["shape"]
        return height, width

    def frames(self, key: str) -> np.ndarray:
        """All pictures of one camera, uint8 [frames, H, W, 3], decoded into memory."""
        height, width = self.picture_size(key)
        frames = np.empty((self.length, height, width, 3), np.uint8)
        files: dict[Path, np.ndarray] = {}
        for episode in self.episodes:
            path, seconds = episode.videos[key]
            if path not in files:
                files = {path: _decode(path)}  # episodes of one file follow each other: keep one file in memory
            first, count = round(seconds * self.fps), episode.stop - episode.start
            part = files[path][first : first + count]
            if len(part) != count:
                raise DatasetError(
                    f"{path}: episode {episode.index} needs frames up to {first + count}, found {len(files[path])}"
                )
            frames[episode.start : episode.stop] = part
        return frames


def _decode(path: Path) -> np.ndarray:
    import av

    try:
        with av.open(str(path)) as container:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    except (OSError, av.error.FFmpegError) as error:
        raise DatasetError(f"can't decode {path}: {error}") from error
