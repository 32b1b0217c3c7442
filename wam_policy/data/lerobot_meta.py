"""Reads what a LeRobot dataset says about itself in `meta/`, checked before anything relies on it.

Formats: https://github.com/huggingface/lerobot, `docs/source/lerobot-dataset-v3.mdx`. Versions 2.0
and 2.1 have one parquet file and one video per camera for every episode; they differ in statistics
only, which are not read here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from wam_policy.data.tables import CURE, integer_column, read_table, text_column
from wam_policy.errors import ConfigError, DatasetError
from wam_policy.utils import documents
from wam_policy.utils.json_dataclass import from_plain

# Beside LeRobot's own files, which cannot express what a gripper's numbers mean.
CONTRACT_PATH = "meta/wam_contract.json"

VERSIONS = ("v2.0", "v2.1", "v3.0")

# LeRobot's patterns of the paths of files, for messages.
DATA_PATHS = {
    "v2": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    "v3": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
}
VIDEO_PATHS = {
    "v2": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    "v3": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
}

# Largest size of a feature along an axis, and number of axes; names are made for every number.
MAX_SIZE = 2**16
MAX_AXES = 8

# Features that LeRobot adds to every dataset, and those that describe a task's outcome.
_NON_ROBOT_FEATURES = re.compile(
    r"timestamp|frame_index|episode_index|index|task_index|next\..*|.*is_pad"
)

# Types of numbers that a vector may have.
_NUMBERS = re.compile(r"bool|u?int(8|16|32|64)|float(16|32|64)")

# A field of a path pattern, such as {video_key} or {episode_index:06d}.
_FIELD = re.compile(r"\{(\w+)(?::0?(\d{0,2})d)?\}")


@dataclass(frozen=True)
class Feature:
    """What `meta/info.json` says about a feature."""

    dtype: str
    shape: tuple[int, ...]
    names: Any = None


@dataclass(frozen=True)
class DatasetInfo:
    """The entries of `meta/info.json` that this package reads."""

    codebase_version: str
    fps: float
    features: dict[str, Feature]
    total_frames: int
    total_episodes: int | None = None
    chunks_size: int | None = None  # episodes per folder of files in version 2
    data_path: str | None = None
    video_path: str | None = None

    @property
    def generation(self) -> str:
        """Layout of the files: "v2" or "v3"."""
        return self.codebase_version.partition(".")[0]


@dataclass(frozen=True)
class EpisodeInfo:
    """What `meta/` says about one episode."""

    index: int
    length: int
    # Video file of each camera's feature, and the time in it at which the episode starts (seconds).
    videos: dict[str, tuple[Path, float]]


def read_info(folder: Path) -> DatasetInfo:
    """Read and check `meta/info.json`.

    Raises:
        DatasetError: The file is missing, damaged, of another version, or contradicts itself.
    """
    path = folder / "meta/info.json"
    if not path.is_file():
        raise DatasetError(f"{folder} is not a LeRobot dataset: it has no meta/info.json")
    data = documents.read_json_object(path, DatasetError, CURE)
    version = data.get("codebase_version")
    if version not in VERSIONS:
        raise DatasetError(
            f"{folder} is a LeRobot dataset {version!r:.20}; this reader knows "
            f"{', '.join(VERSIONS)}: convert it with LeRobot's scripts"
        )
    try:
        info = from_plain(DatasetInfo, data, foreign=True)
    except ConfigError as error:
        raise DatasetError(f"{path}: {error}; {CURE}") from error

    _check_paths(path, info)
    counts = {"fps": info.fps, "total_frames": info.total_frames, "chunks_size": info.chunks_size}
    for name, value in counts.items():
        if value is not None and value <= 0:
            raise DatasetError(f"{path}: `{name}` must be positive, got {value:g}; {CURE}")
    for key, feature in info.features.items():
        if len(feature.shape) > MAX_AXES or not all(1 <= n <= MAX_SIZE for n in feature.shape):
            raise DatasetError(
                f"{path}: the sizes of {key!r} must be from 1 to {MAX_SIZE}, "
                f"got {list(feature.shape)!s:.200}; {CURE}"
            )
    return info


def _check_paths(path: Path, info: DatasetInfo) -> None:
    """Check that `meta/info.json` has the entries that the paths of the dataset's files need."""
    needed = []
    if info.generation == "v2":
        needed += ["chunks_size", "data_path"]
    if any(feature.dtype == "video" for feature in info.features.values()):
        needed.append("video_path")
    missing = [name for name in needed if getattr(info, name) is None]
    if missing:
        raise DatasetError(f"{path} lacks `{', '.join(missing)}`; {CURE}")


def vector_names(info: DatasetInfo) -> dict[str, tuple[str, ...]]:
    """Return the names of the numbers of each vector that describes the robot.

    Raises:
        DatasetError: A vector has another number of names than of numbers.
    """
    names = {}
    for key, feature in info.features.items():
        is_number = _NUMBERS.fullmatch(feature.dtype) is not None
        if is_number and len(feature.shape) == 1 and not _NON_ROBOT_FEATURES.fullmatch(key):
            names[key] = number_names(key, feature)
    return names


def number_names(key: str, feature: Feature) -> tuple[str, ...]:
    """Return the names of a vector's numbers: the declared ones, or else "<vector>_<i>".

    LeRobot and its converters declare a list (also of lists), the indices by name, groups of names,
    or one name for the whole vector.

    Raises:
        DatasetError: There are several names, but not one for each number.
    """
    size = feature.shape[0]
    names = _flat_names(feature.names)
    vector = key.removeprefix("observation.")
    if len(names) == size and len(set(names)) == size:
        return tuple(names)

    # A single name for many numbers is that of the vector; repeated names tell nothing apart.
    if len(names) in (0, 1, size):
        return tuple(f"{vector}_{i}" for i in range(size))
    raise DatasetError(
        f"meta/info.json: {key!r} has {size} numbers (`shape`), but {len(names)} names "
        f"({', '.join(names):.200}); correct one of them"
    )


def _flat_names(names: Any) -> list[str]:
    """Return declared names as a list, in the order of the numbers."""
    if names is None:
        return []
    if isinstance(names, str):
        return [names]
    if isinstance(names, Mapping):
        # Either the index of every name, or groups of names.
        if names and all(type(index) is int for index in names.values()):
            return sorted(map(str, names), key=lambda name: names[name])
        groups = [name for group in names.values() for name in _flat_names(group)]
        if len(set(groups)) == len(groups):
            return groups
        return [f"{group}.{name}" for group in names for name in _flat_names(names[group])]
    if isinstance(names, list):
        return [name for item in names for name in _flat_names(item)]
    return [str(names)]


def episodes_v2(folder: Path, info: DatasetInfo, cameras: list[str]) -> list[EpisodeInfo]:
    """Read `meta/episodes.jsonl`; a video holds one episode.

    Raises:
        DatasetError: The file is missing or damaged.
    """
    episodes = []
    for where, row in documents.read_json_lines(_jsonl(folder, "episodes"), DatasetError, CURE):
        _check_tasks(row.get("tasks"), where)
        index = _integer(row, "episode_index", where)
        videos = {}
        for key in cameras:
            fields = _v2_fields(info, index) | {"video_key": key}
            videos[key] = (fill_path(folder, info, "video_path", fields), 0.0)
        episodes.append(EpisodeInfo(index, _integer(row, "length", where), videos))
    return episodes


def row_files_v2(folder: Path, info: DatasetInfo, episodes: list[EpisodeInfo]) -> list[Path]:
    """Return the files of the rows: one for each episode."""
    return [
        fill_path(folder, info, "data_path", _v2_fields(info, episode.index))
        for episode in episodes
    ]


def _v2_fields(info: DatasetInfo, index: int) -> dict[str, int | str]:
    """Return the fields of the paths of an episode's files."""
    assert info.chunks_size is not None  # checked by `read_info`
    return {"episode_chunk": index // info.chunks_size, "episode_index": index}


def episodes_v3(folder: Path, info: DatasetInfo, cameras: list[str]) -> list[EpisodeInfo]:
    """Read `meta/episodes/`; a video holds many episodes, each of which starts at its own time.

    Raises:
        DatasetError: A file is missing or damaged, or rows do not follow each other.
    """
    columns = ["episode_index", "dataset_from_index", "dataset_to_index", "tasks"]
    for key in cameras:
        columns += [f"videos/{key}/{name}" for name in ("chunk_index", "file_index")]
        columns.append(f"videos/{key}/from_timestamp")

    rows: list[tuple[int, int, EpisodeInfo]] = []
    for file in numbered_files(folder, "meta/episodes"):
        table = read_table(file, columns)
        _check_present(file, table)
        for i, tasks in enumerate(table["tasks"].to_pylist()):
            _check_tasks(tasks, f"{file}, row {i}")
        integers = {
            name: integer_column(file, table, name)
            for name in columns
            if name != "tasks" and not name.endswith("from_timestamp")
        }
        times = {key: _times(file, table, f"videos/{key}/from_timestamp") for key in cameras}
        for i in range(table.num_rows):
            videos = {}
            for key in cameras:
                fields: dict[str, int | str] = {
                    "video_key": key,
                    "chunk_index": int(integers[f"videos/{key}/chunk_index"][i]),
                    "file_index": int(integers[f"videos/{key}/file_index"][i]),
                }
                path = fill_path(folder, info, "video_path", fields)
                videos[key] = (path, float(times[key][i]))
            start = int(integers["dataset_from_index"][i])
            stop = int(integers["dataset_to_index"][i])
            index = int(integers["episode_index"][i])
            rows.append((start, stop, EpisodeInfo(index, stop - start, videos)))

    # Files may list episodes in another order than that of their rows.
    rows.sort(key=lambda row: row[:2])
    expected = 0
    for start, stop, episode in rows:
        if start != expected:
            raise DatasetError(
                f"{folder}/meta/episodes: episode {episode.index} begins at row {start}, but the "
                f"episode before it ends at {expected}; {CURE}"
            )
        expected = stop
    return [episode for _, _, episode in rows]


def numbered_files(folder: Path, subfolder: str) -> list[Path]:
    """Return the parquet files of a folder of version 3 in the order of their numbers.

    Raises:
        DatasetError: There is none.
    """
    files = list((folder / subfolder).glob("chunk-*/file-*.parquet"))
    if not files:
        raise DatasetError(f"{folder}/{subfolder} holds no parquet file; {CURE}")

    def numbers(file: Path) -> tuple[tuple[int, ...], str]:
        """Return the numbers in the names, of which LeRobot writes at least three digits."""
        name = f"{file.parent.name}/{file.name}"
        return tuple(int(number) for number in re.findall(r"\d+", name)), name

    return sorted(files, key=numbers)


def read_tasks(folder: Path, info: DatasetInfo) -> dict[int, str]:
    """Read the table of tasks: the sentence of each `task_index`.

    Raises:
        DatasetError: The table is missing or damaged, or has two sentences for one index.
    """
    tasks: dict[int, str] = {}
    rows = _tasks_v2(folder) if info.generation == "v2" else _tasks_v3(folder)
    for where, index, text in rows:
        if tasks.setdefault(index, text) != text:
            raise DatasetError(
                f"{where}: task {index} is {text!r:.100}, but it is also {tasks[index]!r:.100}; "
                f"remove one of them"
            )
    return tasks


def _tasks_v2(folder: Path) -> Iterator[tuple[str, int, str]]:
    """Yield place, index and sentence of the tasks in `meta/tasks.jsonl`."""
    for where, row in documents.read_json_lines(_jsonl(folder, "tasks"), DatasetError, CURE):
        text = row.get("task")
        if not isinstance(text, str):
            raise DatasetError(f"{where}: `task` must be a sentence, got {text!r:.100}; {CURE}")
        yield where, _integer(row, "task_index", where), text


def _tasks_v3(folder: Path) -> Iterator[tuple[str, int, str]]:
    """Yield place, index and sentence of the tasks in `meta/tasks.parquet`."""
    path = folder / "meta/tasks.parquet"
    table = read_table(path)
    indices = integer_column(path, table, "task_index")
    texts = text_column(path, table, _task_column(path, table))
    for i, (index, text) in enumerate(zip(indices.tolist(), texts, strict=True)):
        yield f"{path}, row {i}", index, text


def _task_column(path: Path, table: Any) -> str:
    """Return the column of the sentences: the index of the pandas frame, or the column `task`.

    LeRobot names the index `task` since version 0.6; before, it had no name.
    """
    if "task" in table.column_names:
        return "task"
    pandas = (table.schema.metadata or {}).get(b"pandas", b"{}")
    with documents.explained(path, DatasetError, CURE):
        index = json.loads(pandas).get("index_columns", [])
    for name in (*index, "__index_level_0__"):
        if isinstance(name, str) and name in table.column_names and name != "task_index":
            return name
    raise DatasetError(
        f"{path} has neither an index nor a column `task` that holds the sentences; it has "
        f"{table.column_names}"
    )


def fill_path(folder: Path, info: DatasetInfo, name: str, fields: Mapping[str, int | str]) -> Path:
    """Fill the fields of a path pattern of `meta/info.json`.

    Args:
        folder: Folder of the dataset.
        info: Contents of `meta/info.json`.
        name: "data_path" or "video_path".
        fields: Values by field.

    Returns:
        Path of a file inside the folder.

    Raises:
        DatasetError: The pattern holds an unknown field, or leads out of the folder.
    """
    defaults = DATA_PATHS if name == "data_path" else VIDEO_PATHS
    pattern: str = getattr(info, name)

    def fill(match: re.Match[str]) -> str:
        """Return the text of a field."""
        value = fields.get(match[1])
        if value is None or (match[2] is not None and isinstance(value, str)):
            raise DatasetError(
                f"{folder}/meta/info.json: `{name}` is {pattern!r:.200}, whose field {match[0]} "
                f"is none of {', '.join(fields)}; "
                f"write LeRobot's pattern, {defaults[info.generation]}"
            )
        return str(value).zfill(int(match[2] or 0))

    filled = _FIELD.sub(fill, pattern)
    path = PurePosixPath(filled)
    if path.is_absolute() or ".." in path.parts or re.search(r"[{}\\\0]", filled):
        raise DatasetError(
            f"{folder}/meta/info.json: `{name}` is {pattern!r:.200}, which is no path inside the "
            f"dataset; write LeRobot's pattern, {defaults[info.generation]}"
        )
    return folder / path


def _jsonl(folder: Path, name: str) -> Path:
    """Return the path of a document of version 2, which must exist."""
    path = folder / f"meta/{name}.jsonl"
    if not path.is_file():
        raise DatasetError(f"{folder} has no meta/{name}.jsonl; {CURE}")
    return path


def _integer(row: Mapping[str, Any], name: str, where: str) -> int:
    """Return an entry that must be an integer and not negative."""
    value = row.get(name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or not 0 <= value < 2**31:
        raise DatasetError(
            f"{where}: `{name}` must be an integer from 0 on, got {value!r:.100}; {CURE}"
        )
    return value


def _check_tasks(tasks: Any, where: str) -> None:
    """Check that the tasks of an episode are text, or none.

    Which sentence a row has is said by its `task_index`.
    """
    if isinstance(tasks, str):
        return
    if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
        raise DatasetError(
            f"{where}: `tasks` must be a list of sentences, got {tasks!r:.100}; {CURE}"
        )


def _check_present(file: Path, table: Any) -> None:
    """Check that no entry of a table of episodes is empty."""
    for name in table.column_names:
        column = table[name]
        if column.null_count:
            row = column.is_null().to_pylist().index(True)
            episode = table["episode_index"][row].as_py()
            raise DatasetError(f"{file}: `{name}` of episode {episode} is empty; {CURE}")


def _times(file: Path, table: Any, name: str) -> np.ndarray:
    """Return a column of times in seconds, float64."""
    column = table[name]
    try:
        times = np.asarray(column.to_numpy(), np.float64)
    except (TypeError, ValueError) as error:
        raise DatasetError(f"{file}: `{name}` must be a number ({error}); {CURE}") from error
    if not np.isfinite(times).all():
        raise DatasetError(f"{file}: `{name}` is not finite in some rows; {CURE}")
    return times
