"""How a run normalises states and actions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from wam_policy.data.mixture import Mixture
from wam_policy.errors import ConfigError, DatasetError
from wam_policy.hub import dataset_stats as given
from wam_policy.normalize import Normalization, compute_statistics
from wam_policy.training.config import AnyTrainConfig
from wam_policy.training.initialization import InitWeights
from wam_policy.training.resolve import action_layout, state_names

STATISTICS = "dataset_stats.json"  # in the folder of a run


def resolve_normalization(
    config: AnyTrainConfig, dataset: Mixture, start: InitWeights | None
) -> tuple[Normalization, Normalization]:
    """How the state and the actions are normalised.

    Raises:
        ConfigError: as another policy does that has none, or is another robot's.
        CheckpointError: by a file that can't be read or doesn't fit.
        DatasetError: by a file of other data.
    """
    keys, modes = (
        ("observation.state", "action"),
        (config.state_normalization, config.action_normalization),
    )
    parts = (
        ("state", len(state_names(config, dataset))),
        ("action", action_layout(config, dataset).dim),
    )
    if config.stats is not None:
        state, action = (
            given.read_normalization(config.stats, name, mode, dim)
            for (name, dim), mode in zip(parts, modes, strict=True)
        )
        given.check_computed_from(config.stats, dataset=dataset.fingerprint(), rows=dataset.length)
        for key, one in zip(keys, (state, action), strict=True):
            _check_similar(config.stats, key, one, compute_statistics(dataset.vector(key)))
        return state, action
    if not config.keep_normalization and given.was_computed_from(
        made := config.output_dir / STATISTICS, dataset.fingerprint()
    ):
        said = zip(parts, modes, strict=True)
        state, action = (
            given.read_normalization(made, name, mode, dim, also=given.ALL)
            for (name, dim), mode in said
        )
        return state, action
    if not config.keep_normalization:
        pairs = zip(modes, keys, strict=True)
        state, action = (
            Normalization(mode=mode, statistics=compute_statistics(dataset.vector(key)))
            for mode, key in pairs
        )
        return state, action
    if start is None or start.normalization is None:
        raise ConfigError(
            "`keep_normalization` of what? There is no policy to begin from: name one with --pretrained-path, or leave it out"
        )
    names = (state_names(config, dataset), action_layout(config, dataset).names)
    theirs = tuple(map(tuple, start.normalization.names))
    if names != theirs:
        raise ConfigError(
            f"`keep_normalization`: {start.folder} has the numbers {theirs}, the data {names}; leave it out"
        )
    return start.normalization.state, start.normalization.action


def _check_similar(
    file: Path, key: str, said: Normalization, found: Mapping[str, Sequence[float]]
) -> None:
    """Refuse statistics that are far from the data's: a reference's file has no hash, and its quantiles are estimates."""
    spread = np.maximum(np.subtract(found["max"], found["min"]), 1e-6)
    worst = max(
        float((np.abs(np.subtract(row, found[name])) / spread).max())
        for name, row in said.statistics.items()
    )
    if worst > 0.05:
        raise DatasetError(
            f"{file} holds the statistics of other data: those of {key} are off by {worst:.0%} of its range; leave --stats "
            f"out, then they are computed"
        )
