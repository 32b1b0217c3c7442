"""How a run normalises states and actions.

See docs/method.md, "Data and normalisation".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from wam_policy.data.mixture import Mixture
from wam_policy.errors import ConfigError, DatasetError
from wam_policy.hub import dataset_stats
from wam_policy.normalize import Normalization, compute_statistics
from wam_policy.training.checkpoint import latest_checkpoint
from wam_policy.training.config import AnyTrainConfig
from wam_policy.training.initialization import InitWeights
from wam_policy.training.resolve import action_layout, state_names

STATISTICS = "dataset_stats.json"  # in the folder of a run

# Largest deviation of a given statistic from the data's, as a fraction of the data's range.
TOLERANCE = 0.05


def resolve_normalization(
    config: AnyTrainConfig, dataset: Mixture, start: InitWeights | None
) -> tuple[Normalization, Normalization]:
    """Return the normalisation of the state and of the actions.

    The statistics come from `config.stats`, from the pretrained policy with
    `config.keep_normalization`, from the folder of a run that is resumed, or else from the data.

    Args:
        config: Resolved options of the run.
        dataset: Data that it trains on.
        start: Weights that it starts from; None: new ones.

    Raises:
        ConfigError: The pretrained policy has no normalisation, or is for another robot.
        ActionError: The recorded actions cannot be mapped onto the layout.
        CheckpointError: The statistics file cannot be read, or does not fit the vectors.
        DatasetError: The statistics file is of other data.
    """
    states = dataset.states()
    actions = dataset.actions(action_layout(config, dataset))

    # Statistics of the same data that were computed elsewhere.
    if config.stats is not None:
        state, action = _read(config.stats, config, dataset)
        fingerprint = dataset.fingerprint()
        dataset_stats.check_computed_from(config.stats, dataset=fingerprint, rows=dataset.length)
        _check_similar(config.stats, "observation.state", state, states)
        _check_similar(config.stats, "action", action, actions)
        return state, action
    if config.keep_normalization:
        return _pretrained_normalization(config, dataset, start)

    # A run that is resumed has already written the statistics of its data. Without a checkpoint the
    # file may be of an attempt with another action layout.
    path = config.output_dir / STATISTICS
    is_resumed = latest_checkpoint(config.output_dir) is not None
    if is_resumed and dataset_stats.was_computed_from(path, dataset.fingerprint()):
        return _read(path, config, dataset, also=dataset_stats.ALL)
    return (
        Normalization(
            mode=config.state_normalization,
            statistics=compute_statistics(states),
        ),
        Normalization(
            mode=config.action_normalization,
            statistics=compute_statistics(actions),
        ),
    )


def _read(
    path: Path, config: AnyTrainConfig, dataset: Mixture, also: tuple[str, ...] = ()
) -> tuple[Normalization, Normalization]:
    """Read the normalisation of state and actions from a `dataset_stats.json`."""
    state_dim = len(state_names(config, dataset))
    action_dim = action_layout(config, dataset).dim
    state = dataset_stats.read_normalization(
        path, "state", config.state_normalization, state_dim, also=also
    )
    action = dataset_stats.read_normalization(
        path, "action", config.action_normalization, action_dim, also=also
    )
    return state, action


def _pretrained_normalization(
    config: AnyTrainConfig, dataset: Mixture, start: InitWeights | None
) -> tuple[Normalization, Normalization]:
    """Return the pretrained policy's normalisation, after a check that its robot is the same."""
    if start is None or start.normalization is None:
        raise ConfigError(
            "`keep_normalization` needs a pretrained policy to take it from: name one with "
            "--pretrained-path, or leave it out"
        )

    # Statistics of other numbers would scale actions wrongly, without any error.
    names = (state_names(config, dataset), action_layout(config, dataset).names)
    pretrained_names = tuple(tuple(vector) for vector in start.normalization.names)
    if names != pretrained_names:
        raise ConfigError(
            f"`keep_normalization`: the state and actions of {start.folder} are "
            f"{pretrained_names}, those of the data {names}; leave it out"
        )
    return start.normalization.state, start.normalization.action


def _check_similar(path: Path, key: str, stated: Normalization, rows: np.ndarray) -> None:
    """Check that statistics read from a file are close to those of the data.

    A file of the reference implementation holds no hash, and its quantiles are estimates.

    Raises:
        DatasetError: A statistic deviates by more than `TOLERANCE` of the data's range.
    """
    computed: Mapping[str, Sequence[float]] = compute_statistics(rows)

    # A constant number has no range to compare with.
    data_range = np.maximum(np.subtract(computed["max"], computed["min"]), 1e-6)
    deviations = []
    for name, values in stated.statistics.items():
        deviation = np.abs(np.subtract(values, computed[name])) / data_range
        deviations.append(float(deviation.max()))

    # A mode that needs no statistics has none that could deviate.
    largest = max(deviations, default=0.0)
    if largest > TOLERANCE:
        raise DatasetError(
            f"{path} holds the statistics of other data: those of {key} deviate by "
            f"{largest:.0%} of its range; leave --stats out to compute them"
        )
