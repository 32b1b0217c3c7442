"""Reading and writing of dataset statistics in the file `dataset_stats.json`.

The format is the reference implementation's (https://github.com/yuantianyuan01/FastWAM). See
docs/method.md, "Data and normalisation".
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from wam_policy.errors import CheckpointError, DatasetError
from wam_policy.normalize import Mode, Normalization, compute_statistics, required_statistics
from wam_policy.utils.io import write_text

# Statistics that the normalisation modes use.
ALL = ("min", "max", "mean", "std", "q01", "q99")

# The released files hold one group of statistics for all datasets, under this key.
KEY = "default"


def read_normalization(
    path: Path, vector: str, mode: Mode, dim: int, also: tuple[str, ...] = ()
) -> Normalization:
    """Read the normalisation of a vector, which is the same for every step of a chunk.

    Args:
        path: File of the statistics.
        vector: "state" or "action".
        mode: Normalisation mode of the training, which the file does not record.
        dim: Length of the vector.
        also: Statistics to keep beside those of the mode.

    Returns:
        The normalisation.

    Raises:
        CheckpointError: The file is missing, or lacks statistics of this length.
    """
    names = {*required_statistics(mode), *also}
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        group = data[vector][KEY]
        statistics = {}
        for name in ALL:
            if name in names:
                statistics[name] = tuple(map(float, group[f"global_{name}"]))
        normalization = Normalization(mode=mode, statistics=statistics)
        normalization.check(vector, dim)
    except OSError as error:
        raise CheckpointError(
            f"no statistics at {path}: without them actions mean nothing; the file is published "
            f"beside the weights, as <name>_dataset_stats.json"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} does not hold the statistics of the {vector} ({mode}, {dim} numbers): "
            f"{error!r}"
        ) from error
    return normalization


def was_computed_from(path: Path, dataset: str) -> bool:
    """Return whether a file of statistics exists and was computed from some data.

    Args:
        path: File of the statistics.
        dataset: SHA-256 of the data.
    """
    if not path.is_file():
        return False
    content = json.loads(path.read_text(encoding="utf-8"))
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
    content = json.loads(path.read_text(encoding="utf-8"))
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
