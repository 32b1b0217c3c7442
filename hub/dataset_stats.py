"""Reading and writing of dataset statistics in the file `dataset_stats.json`.

The format is the reference implementation's (https://github.com/yuantianyuan01/FastWAM). See
docs/method.md, "Data and normalisation".
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from wam_policy.errors import CheckpointError, ConfigError, DatasetError
from wam_policy.normalize import Mode, Normalization, compute_statistics, required_statistics
from wam_policy.utils import documents
from wam_policy.utils.io import write_text

# Statistics that the normalisation modes use.
ALL = ("min", "max", "mean", "std", "q01", "q99")

# The released files hold one group of statistics for all datasets, under this key.
KEY = "default"

_CURE = "download it again, or compute the statistics again"


def read_normalization(
    path: Path,
    vector: str,
    mode: Mode,
    dim: int,
    also: tuple[str, ...] = (),
    groups: tuple[str, ...] = (),
) -> Normalization:
    """Read the normalisation of a vector, which is the same for every step of a chunk.

    Args:
        path: File of the statistics.
        vector: "state" or "action".
        mode: Normalisation mode of the training, which the file does not record.
        dim: Length of the vector.
        also: Statistics to keep beside those of the mode.
        groups: Groups of numbers that the file holds, in the order in which they form the vector;
            empty for the one group of the released files.

    Returns:
        The normalisation.

    Raises:
        CheckpointError: The file is missing, or lacks statistics of this length.
    """
    data = _read_statistics(path)
    by_group = data.get(vector)
    if not isinstance(by_group, dict) or not by_group:
        raise CheckpointError(f"{path} holds no statistics of the {vector}; {_CURE}")
    order = groups or (KEY,)
    is_complete = set(order) == set(by_group) if groups else KEY in by_group
    if not is_complete or len(set(order)) < len(order):
        available = ", ".join(map(str, by_group))
        raise CheckpointError(
            f"{path} holds the statistics of the {vector} in the groups {available}: name them in "
            f"the order in which they form the vector (`{vector}_groups`, or wam convert "
            f"--{vector}-groups …)"
        )

    names = {*required_statistics(mode), *also}
    statistics: dict[str, tuple[float, ...]] = {}
    for name in ALL:
        if name in names:
            numbers = [_numbers(path, vector, by_group[group], name) for group in order]
            statistics[name] = tuple(itertools.chain.from_iterable(numbers))
    try:
        normalization = Normalization(mode=mode, statistics=statistics)
        normalization.check(vector, dim)
    except ConfigError as error:
        raise CheckpointError(
            f"{path} does not hold the statistics of the {vector} ({mode}, {dim} numbers): {error}"
        ) from error
    return normalization


def _read_statistics(path: Path) -> dict[str, Any]:
    """Read a file of statistics."""
    if not path.is_file():
        raise CheckpointError(
            f"no statistics at {path}: without them actions mean nothing; the file is published "
            f"beside the weights, as <name>_dataset_stats.json"
        )
    return documents.read_json_object(path, CheckpointError, _CURE)


def _numbers(path: Path, vector: str, group: Any, name: str) -> list[float]:
    """Return the numbers of a statistic of a group."""
    values = group.get(f"global_{name}") if isinstance(group, dict) else None
    if (
        not isinstance(values, list)
        or not values
        or not all(type(value) in (int, float) for value in values)
    ):
        raise CheckpointError(
            f"{path}: `global_{name}` of the {vector} must be a list of numbers, "
            f"got {values!r:.100}; {_CURE}"
        )
    return [_as_float(value) for value in values]


def _as_float(value: int | float) -> float:
    """Return a number as a float; one that is too large is infinite, which is refused later."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def was_computed_from(path: Path, dataset: str) -> bool:
    """Return whether a file of statistics exists and was computed from some data.

    Args:
        path: File of the statistics.
        dataset: SHA-256 of the data.
    """
    if not path.is_file():
        return False
    content = _read_statistics(path)
    return bool(content.get("dataset_sha256") == dataset)


def check_computed_from(path: Path, *, dataset: str, rows: int) -> None:
    """Check that a file of statistics was computed from some data.

    The recorded SHA-256 decides; without one, the recorded number of rows.

    Args:
        path: File of the statistics.
        dataset: SHA-256 of the data.
        rows: Number of rows of the data.

    Raises:
        DatasetError: The statistics are of other data.
    """
    content = _read_statistics(path)
    recorded_sha256 = content.get("dataset_sha256")
    recorded_rows = content.get("num_transition")

    if recorded_sha256 is None:
        matches = recorded_rows in (None, rows)
    else:
        matches = recorded_sha256 == dataset
    if not matches:
        raise DatasetError(
            f"{path} holds the statistics of other data: expected {rows} rows, sha256 {dataset}, "
            f"got {recorded_rows} rows, sha256 {recorded_sha256}; "
            f"leave out --stats to compute the statistics of this data"
        )


def write_stats(
    path: Path,
    state: np.ndarray | None,
    action: np.ndarray,
    steps: Iterable[np.ndarray],
    *,
    episodes: int,
    dataset: str,
) -> None:
    """Compute statistics and write them in the reference implementation's format.

    Quantiles and deviations are those of all rows together; the reference implementation averages
    over episodes.

    Args:
        path: File to write.
        state: States [N, P]; None for data without states.
        action: Actions [N, A].
        steps: Actions [windows, A] of each step of a chunk; they are consumed one by one.
        episodes: Number of episodes.
        dataset: SHA-256 of the data.
    """
    content: dict[str, Any] = {}
    if state is not None:
        content["state"] = {KEY: _statistics_group(state, [state])}
    content["action"] = {KEY: _statistics_group(action, steps)}
    content["num_episodes"] = episodes
    content["num_transition"] = len(action)
    content["dataset_sha256"] = dataset
    write_text(path, json.dumps(content, indent=2) + "\n")


def _statistics_group(rows: np.ndarray, steps: Iterable[np.ndarray]) -> dict[str, Any]:
    """Return the statistics of all rows [N, D] and those of each step's rows [windows, D]."""
    group: dict[str, Any] = {}
    for name, values in compute_statistics(rows).items():
        group[f"global_{name}"] = list(values)

    by_step = [compute_statistics(step) for step in steps]
    for name in by_step[0]:
        group[f"stepwise_{name}"] = [list(statistics[name]) for statistics in by_step]
    return group
