"""How a run normalises states and actions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from wam_policy.data.mixture import Mixture
from wam_policy.errors import ConfigError, DatasetError
from wam_policy.hub import dataset_stats as given
from wam_policy.normalize import Normalization, statistics
from wam_policy.training.config import AnyTrainConfig
from wam_policy.training.initialization import Start
from wam_policy.training.resolve import layout, state_names

STATISTICS = "dataset_stats.json"  # in the folder of a run


def scaling(config: AnyTrainConfig, dataset: Mixture, start: Start | None) -> tuple[Normalization, Normalization]:
    """How the state and the actions are normalised.

    Raises:
        ConfigError: as another policy does that has none, or is another robot's.
        CheckpointError: by a file that can't be read or doesn't fit.
        DatasetError: by a file of other data.
    """
    keys, modes = ("observation.state", "action"), (config.state_scaling, config.action_scaling)
    parts = (("state", len(state_names(config, dataset))), ("action", layout(config, dataset).dim))
    if config.stats is not None:
        state, action = (given.read(config.stats, name, mode, dim) for (name, dim), mode in zip(parts, modes, strict=True))
        given.check_of(config.stats, dataset=dataset.fingerprint(), rows=dataset.length)
        for key, one in zip(keys, (state, action), strict=True):
            _alike(config.stats, key, one, statistics(dataset.vector(key)))
        return state, action
    if not config.keep_scaling and given.is_of(made := config.out / STATISTICS, dataset.fingerprint()):
        said = zip(parts, modes, strict=True)
        state, action = (given.read(made, name, mode, dim, also=given.ALL) for (name, dim), mode in said)
        return state, action
    if not config.keep_scaling:
        pairs = zip(modes, keys, strict=True)
        state, action = (Normalization(mode=mode, statistics=statistics(dataset.vector(key))) for mode, key in pairs)
        return state, action
    if start is None or start.scaling is None:
        raise ConfigError("`keep_scaling` of what? There is no policy to begin from: name one with --init, or leave it out")
    names = (state_names(config, dataset), layout(config, dataset).names)
    theirs = tuple(map(tuple, start.scaling.names))
    if names != theirs:
        raise ConfigError(f"`keep_scaling`: {start.folder} has the numbers {theirs}, the data {names}; leave it out")
    return start.scaling.state, start.scaling.action


def _alike(file: Path, key: str, said: Normalization, found: Mapping[str, Sequence[float]]) -> None:
    """Refuse statistics that are far from the data's: a reference's file has no hash, and its quantiles are estimates."""
    spread = np.maximum(np.subtract(found["max"], found["min"]), 1e-6)
    worst = max(float((np.abs(np.subtract(row, found[name])) / spread).max()) for name, row in said.statistics.items())
    if worst > 0.05:
        raise DatasetError(
            f"{file} holds the statistics of other data: those of {key} are off by {worst:.0%} of its range; leave --stats "
            f"out, then they are computed"
        )
