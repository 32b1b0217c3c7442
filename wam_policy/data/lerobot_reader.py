"""Reads LeRobot datasets v2.1 and v3.0 from a folder with pyarrow and PyAV.

Layouts: https://github.com/huggingface/lerobot (`docs/source/lerobot-dataset-v3.mdx`; v2.1 has one file per episode).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wam_policy.config import from_plain
from wam_policy.contract import ActionLayout
from wam_policy.data.video_reader import read_frames
from wam_policy.errors import DatasetError, MissingExtraError

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as error:
    raise MissingExtraError("pyarrow", "train") from error

CONTRACT_PATH = "meta/wam_contract.json"  # beside LeRobot's own files, which can't say what a gripper's numbers mean


OWN_COLUMNS = (
    "timestamp",
    "next.reward",
)  # vectors of one number that describe the recording, not the robot


@dataclass(frozen=True)
class Episode:
    """One episode's place in the dataset."""

    index: int
    task: str
    start: int  # first row
    stop: int  # row after the last
    videos: dict[
        str, tuple[Path, float]
    ]  # camera key -> file, and the time in it where the episode begins (seconds)


class LeRobotDataset:
    """A LeRobot folder: its episodes, its vectors in memory, its frames on request."""

    def __init__(self, folder: str | Path) -> None:
        """Read everything but the frames.

        Raises:
            DatasetError: no dataset, one of an unknown version, or one whose parts don't fit together.
        """
        self.folder = Path(folder)
        info_path = self.folder / "meta/info.json"
        if not info_path.is_file():
            raise DatasetError(f"{self.folder} is no LeRobot dataset: it has no meta/info.json")
        self.info: dict[str, Any] = json.loads(info_path.read_text())
        version = self.info.get("codebase_version")
        if version not in ("v2.1", "v3.0"):
            raise DatasetError(
                f"{self.folder} is a LeRobot dataset {version}; this reader knows v2.1 and v3.0"
            )
        self.fps = float(self.info["fps"])
        features = self.info["features"]
        self.cameras = [key for key, feature in features.items() if feature["dtype"] == "video"]
        stills = [key for key, feature in features.items() if feature["dtype"] == "image"]
        if stills and not self.cameras:
            raise DatasetError(
                f"{self.folder} keeps {stills} as pictures: write it with videos (`use_videos=True`)"
            )
        self.names = {
            key: _names(key, feature)
            for key, feature in features.items()
            if feature["dtype"] in ("float32", "float64")
            and len(feature["shape"]) == 1
            and key not in OWN_COLUMNS
        }
        rows, files = self._episodes_v21() if version == "v2.1" else self._episodes_v30()
        self.episodes = rows
        columns = ["episode_index", "task_index", *self.names]
        self._table = pa.concat_tables([_table(file, columns) for file in files])
        self.length = self._table.num_rows
        if self.length != self.info["total_frames"]:
            raise DatasetError(
                f"{self.folder}: info.json promises {self.info['total_frames']} frames, found {self.length}"
            )
        if sum(e.stop - e.start for e in self.episodes) != self.length:
            raise DatasetError(
                f"{self.folder}: the episodes' lengths don't add up to its {self.length} frames"
            )
        self._tasks = self._task_table(version)
        told = self._table["episode_index"].to_numpy()
        for episode in self.episodes:
            if (told[episode.start : episode.stop] != episode.index).any():
                raise DatasetError(
                    f"{self.folder}: rows {episode.start} to {episode.stop} aren't those of episode {episode.index}"
                )

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 over what the dataset says of itself (`meta/`), its rows (`data/`), and its videos' names and sizes."""
        digest = hashlib.sha256()
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            name = path.relative_to(self.folder)
            if name.parts[0] in ("meta", "data", "videos"):
                digest.update(f"{name}\0{path.stat().st_size}\0".encode())
                if name.parts[0] != "videos":
                    with path.open("rb") as file:
                        digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def _episodes_v30(self) -> tuple[list[Episode], list[Path]]:
        """Episodes, and the files of their rows: many episodes a file."""
        files = {
            under: sorted((self.folder / under).glob("chunk-*/file-*.parquet"))
            for under in ("meta/episodes", "data")
        }
        for under, found in files.items():
            if not found:
                raise DatasetError(f"{self.folder}/{under} holds no parquet file")
        episodes = []
        for row in pa.concat_tables([_table(file) for file in files["meta/episodes"]]).to_pylist():
            videos = {}
            for key in self.cameras:
                place = {name: row[f"videos/{key}/{name}_index"] for name in ("chunk", "file")}
                name = self.info["video_path"].format(
                    video_key=key, chunk_index=place["chunk"], file_index=place["file"]
                )
                videos[key] = (self.folder / name, float(row[f"videos/{key}/from_timestamp"]))
            start, stop = row["dataset_from_index"], row["dataset_to_index"]
            episodes.append(Episode(row["episode_index"], row["tasks"][0], start, stop, videos))
        return episodes, files["data"]

    def _episodes_v21(self) -> tuple[list[Episode], list[Path]]:
        """Episodes, and the files of their rows: one a file, its videos likewise."""
        episodes, files, start = [], [], 0
        for row in self._lines("episodes.jsonl"):
            index = row["episode_index"]
            place = {"episode_chunk": index // self.info["chunks_size"], "episode_index": index}
            videos = {
                key: (self.folder / self.info["video_path"].format(video_key=key, **place), 0.0)
                for key in self.cameras
            }
            episodes.append(Episode(index, row["tasks"][0], start, start + row["length"], videos))
            files.append(self.folder / self.info["data_path"].format(**place))
            start += row["length"]
        return episodes, files

    def _lines(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / "meta" / name
        if not path.is_file():
            raise DatasetError(f"{self.folder} has no meta/{name}")
        return [json.loads(line) for line in path.read_text().splitlines() if line]

    def _task_table(self, version: str) -> dict[int, str]:
        if version == "v2.1":
            return {row["task_index"]: row["task"] for row in self._lines("tasks.jsonl")}
        rows = _table(self.folder / "meta/tasks.parquet").to_pylist()
        return {
            row["task_index"]: next(x for name, x in row.items() if name != "task_index")
            for row in rows
        }

    def instructions(self) -> list[str]:
        """The sentence that belongs to each frame.

        Raises:
            DatasetError: a frame's has no text.
        """
        found = self._table["task_index"].to_pylist()
        if unknown := set(found) - self._tasks.keys():
            raise DatasetError(f"{self.folder}: its tasks don't say what task {min(unknown)} is")
        return [self._tasks[index] for index in found]

    @property
    def has_action_layout(self) -> bool:
        """Whether `meta/wam_contract.json` declares what the recorded actions mean."""
        return (self.folder / CONTRACT_PATH).is_file()

    def action_layout(self) -> ActionLayout:
        """What the recorded actions mean, from `meta/wam_contract.json`.

        Raises:
            DatasetError: the dataset doesn't say.
        """
        if not self.has_action_layout:
            raise DatasetError(
                f"{self.folder} doesn't say what its actions mean; write {CONTRACT_PATH}: "
                f'{{"action": {{"names": […], "control": "end_effector_delta", '
                f'"gripper": {{"index": 6, "open": 1.0, "closed": 0.0}}}}}}'
            )
        contract = json.loads((self.folder / CONTRACT_PATH).read_text())
        return from_plain(ActionLayout, contract["action"], "action")

    def vector(self, key: str) -> np.ndarray:
        """A feature of every frame, float32 [frames, numbers].

        Raises:
            DatasetError: no such feature, or a value that isn't finite (named by episode and frame).
        """
        if key not in self.names:
            raise DatasetError(f"{self.folder} has no feature {key!r}; it has {sorted(self.names)}")
        column = self._table[key].combine_chunks()
        values = (
            column.flatten()
            .to_numpy(zero_copy_only=False)
            .astype(np.float32)
            .reshape(self.length, -1)
        )
        bad = np.flatnonzero(~np.isfinite(values).all(1))
        if len(bad):
            episode = next(one for one in self.episodes if one.start <= bad[0] < one.stop)
            raise DatasetError(
                f"{self.folder}: {key} isn't finite in episode {episode.index}, frame {bad[0] - episode.start}"
            )
        return values

    def columns(self, key: str, names: Sequence[str]) -> np.ndarray:
        """Some numbers of a feature, by name, float32 [frames, len(names)].

        Raises:
            DatasetError: it hasn't all of them.
        """
        values = self.vector(key)
        if missing := [name for name in names if name not in self.names[key]]:
            raise DatasetError(
                f"{self.folder}: {key} has no {missing}; it has {list(self.names[key])}"
            )
        return values[:, [self.names[key].index(name) for name in names]]

    def pictures(self, key: str, episode: Episode, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """One camera's pictures in some rows of an episode, rising, uint8 [len(rows), H, W, 3]; no others are decoded.

        Raises:
            DatasetError: no such camera, or a video that can't be decoded or is truncated; the episode is named.
        """
        self.picture_size(key)
        path, seconds = episode.videos[key]
        first = round(seconds * self.fps) - episode.start
        try:
            return read_frames(path, [first + int(row) for row in rows], self.fps)
        except DatasetError as error:
            asked = f"frames {rows[0] - episode.start} to {rows[-1] - episode.start}"
            raise DatasetError(
                f"{self.folder}, episode {episode.index}, {asked}: {error}"
            ) from error

    def picture_size(self, key: str) -> tuple[int, int]:
        """Height and width of one camera's pictures."""
        if key not in self.cameras:
            raise DatasetError(f"{self.folder} has no camera {key!r}; it has {self.cameras}")
        feature = self.info["features"][key]
        planes_first = isinstance(feature.get("names"), list) and str(
            feature["names"][0]
        ).startswith("channel")
        height, width = feature["shape"][1:] if planes_first else feature["shape"][:2]
        return height, width

    def frames(self, key: str) -> np.ndarray:
        """All pictures of one camera, uint8 [frames, H, W, 3], decoded into memory."""
        self.picture_size(key)
        return np.concatenate(
            [self.pictures(key, one, np.arange(one.start, one.stop)) for one in self.episodes]
        )


def _names(key: str, feature: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of a vector's numbers: as they are said, in a list or grouped, else made from its own."""
    names, size = feature.get("names"), feature["shape"][0]
    if isinstance(names, dict):
        names = [
            name
            for group in names.values()
            for name in (group if isinstance(group, list) else [group])
        ]
    if not names or len(names) != size or len(set(names)) != size:
        return tuple(f"{key.removeprefix('observation.')}_{i}" for i in range(size))
    return tuple(map(str, names))


def _table(file: Path, columns: Sequence[str] | None = None) -> pa.Table:
    try:
        return pq.read_table(file, columns=None if columns is None else list(columns))
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(f"{file} can't be read: {error}") from error
