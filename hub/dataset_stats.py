"""Reads and writes the reference's `dataset_stats.json`. Source: spec/fastwam.md section 5.3."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from wam_policy.errors import CheckpointError, DatasetError
from wam_policy.normalize import Mode, Normalization, compute_statistics, required_statistics
from wam_policy.utils.io import write_text

ALL = ("min", "max", "mean", "std", "q01", "q99")  # that a mode may need
KEY = "default"  # the released files hold one group of statistics for all datasets


def read_normalization(
    path: Path, vector: str, mode: Mode, dim: int, also: tuple[str, ...] = ()
) -> Normalization:
    """The normalisation of a whole vector, the same for every step of a chunk.

    Args:
        path: the file.
        vector: "state" or "action".
        mode: what the checkpoint was trained with; the file doesn't say.
        dim: numbers of the vector.
        also: statistics to keep that the mode doesn't need.

    Raises:
        CheckpointError: no such file, or it lacks these statistics or has them of another length.
    """
    wanted = {*required_statistics(mode), *also}
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        found = data[vector][KEY]
        normalization = Normalization(
            mode=mode,
            statistics={
                name: tuple(map(float, found[f"global_{name}"])) for name in ALL if name in wanted
            },
        )
        normalization.check(vector, dim)
    except OSError as error:
        raise CheckpointError(
            f"no statistics at {path}: without them actions mean nothing; the file is published beside the weights, "
            f"as <name>_dataset_stats.json"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} doesn't hold the statistics of the {vector} ({mode}, {dim} numbers): {error!r}"
        ) from error
    return normalization


def was_computed_from(path: Path, dataset: str) -> bool:
    """Whether there is such a file, and it says that it was computed from the data of this SHA-256."""
    return (
        path.is_file()
        and json.loads(path.read_text(encoding="utf-8")).get("dataset_sha256") == dataset
    )


def check_computed_from(path: Path, *, dataset: str, rows: int) -> None:
    """Refuse a file of other data: by what it says it was computed from, else by the number of rows.

    Args:
        path: the file.
        dataset: SHA-256 of the data.
        rows: how many it has.

    Raises:
        DatasetError: it is of other data.
    """
    told = json.loads(path.read_text(encoding="utf-8"))
    theirs, count = told.get("dataset_sha256"), told.get("num_transition")
    if theirs not in (None, dataset) or (theirs is None and count not in (None, rows)):
        raise DatasetError(
            f"{path} holds the statistics of other data ({count} rows, sha256 {theirs}; this data: {rows}, {dataset}): "
            f"leave --stats out, then they are computed"
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
    """Write statistics as the reference has them; the quantiles and deviations are true ones, of all rows alike.

    Args:
        path: the file.
        state: rows [N, P]; None: there is no state.
        action: rows [N, A].
        steps: [windows, A] for each step of a chunk, which are asked for one after the other.
        episodes: how many there are.
        dataset: SHA-256 of what they were computed from.
    """

    def group(rows: np.ndarray, steps: Iterable[np.ndarray]) -> dict[str, Any]:
        whole = {
            f"global_{name}": list(values) for name, values in compute_statistics(rows).items()
        }
        each = [compute_statistics(step) for step in steps]
        return whole | {f"stepwise_{name}": [list(step[name]) for step in each] for name in each[0]}

    found: dict[str, Any] = {} if state is None else {"state": {KEY: group(state, [state])}}
    found["action"] = {KEY: group(action, steps)}
    found |= {"num_episodes": episodes, "num_transition": len(action), "dataset_sha256": dataset}
    write_text(path, json.dumps(found, indent=2) + "\n")
