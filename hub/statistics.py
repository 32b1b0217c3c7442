"""Reads the reference's `dataset_stats.json`. Source: spec/fastwam.md section 5.3."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wam_policy.errors import CheckpointError
from wam_policy.normalize import Mode, Normalization, needs

KEY = "default"  # the released files hold one group of statistics for all datasets


def read(path: Path, vector: str, mode: Mode, dim: int, also: tuple[str, ...] = ()) -> Normalization:
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
    wanted = {*needs(mode), *also}
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        found = data[vector][KEY]
        normalization = Normalization(
            mode=mode, statistics={name: tuple(map(float, found[f"global_{name}"])) for name in sorted(wanted)}
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
