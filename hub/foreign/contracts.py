"""The contract of another project's checkpoint: from the files beside its weights, a known release, or the caller."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from wam_policy.config import DtypeName, PolicyConfig
from wam_policy.errors import CheckpointError, ConfigError, WeightsError
from wam_policy.hub import dataset_stats, weights
from wam_policy.hub.foreign import lerobot, light_wam
from wam_policy.hub.foreign.identify import ForeignCheckpoint
from wam_policy.hub.foreign.shapes import infer_config
from wam_policy.hub.request import STATISTICS, CheckpointRequest, refuse_release_info
from wam_policy.models.config import FastWAMConfig, LightWAMConfig
from wam_policy.presets import PRESETS, RELEASES, ReleaseInfo, preset_of, release_config


def foreign_config(
    found: ForeignCheckpoint, path: Path, wanted: CheckpointRequest
) -> tuple[PolicyConfig, Mapping[str, str]]:
    """The contract of a foreign policy, and where each part of it came from.

    Raises:
        CheckpointError: statistics are missing or don't fit, or nobody says what the policy was trained for.
        ConfigError: what was said doesn't fit the weights.
    """
    if path.is_dir():
        refuse_release_info(path, wanted)
        return lerobot.lerobot_config(
            path, FastWAMConfig(**infer_config(found.tensors, lerobot.head_dim(path)))
        )
    if found.family == "light_wam":
        return _light_contract(found, path, wanted)
    trained = wanted.release or RELEASES.get(path.stem)
    if trained is None or trained.variant is None or trained.action_shift is None:
        raise CheckpointError(
            f"{path.name} doesn't say what it was trained for, and is none of the releases ({', '.join(RELEASES)}); say it: "
            f"from_pretrained(…, release=ReleaseInfo(preset=…, variant=…, action_shift=…)), "
            f"or wam convert --preset {'|'.join(PRESETS)} --variant … --action-shift …"
        )
    model = FastWAMConfig(**infer_config(found.tensors, trained.head_dim))
    config, stats = _contract(found, path, trained, model, wanted.stats or _statistics(path))
    said = "release of this name" if wanted.release is None else "given by the caller"
    return config, {
        "contract": f"preset `{trained.preset}`, variant `{trained.variant}`, action shift {trained.action_shift:g} ({said})",
        "statistics": _named(stats, path),
    }


def _light_contract(
    found: ForeignCheckpoint, path: Path, wanted: CheckpointRequest
) -> tuple[PolicyConfig, Mapping[str, str]]:
    run = light_wam.RunFile(light_wam.find_run_file(path, light_wam.CONFIG))
    trained, origin = light_wam.run_release(run, wanted.release)
    model = light_wam.run_model_config(run, found.tensors, trained.head_dim)
    config, stats = _contract(
        found, path, trained, model, wanted.stats or light_wam.find_run_file(path, STATISTICS)
    )
    return config, {**origin, "statistics": _named(stats, path)}


def _contract(
    found: ForeignCheckpoint,
    path: Path,
    trained: ReleaseInfo,
    model: FastWAMConfig | LightWAMConfig,
    stats: Path,
) -> tuple[PolicyConfig, Path]:
    """The contract of a file of a reference implementation, whose statistics are in `stats`."""
    preset, state = preset_of(found.family, trained.preset), None
    if trained.proprio != (model.proprio_dim is not None):
        raise WeightsError(
            f"{path} holds {'no' if trained.proprio else 'a'} proprio encoder, the policy was trained "
            f"{'with' if trained.proprio else 'without'} one: it is partial or another; if that is how it was trained, say "
            f"Trained(…, proprio={not trained.proprio}), wam convert --{'no-' if trained.proprio else ''}proprio"
        )
    if model.proprio_dim is not None:
        state = dataset_stats.read_normalization(
            stats, "state", preset.normalization, model.proprio_dim
        )
    also = () if preset.snap is None else ("min", "max")
    action = dataset_stats.read_normalization(
        stats, "action", preset.normalization, model.action_dim, also
    )
    try:
        return release_config(
            trained, model, state=state, action=action, dtype=_dtype(found, path)
        ), stats
    except ConfigError as error:
        raise ConfigError(
            f"{path} was not trained for the preset {trained.preset!r}: {error}"
        ) from error


def release_is_known(found: ForeignCheckpoint, path: Path, wanted: CheckpointRequest) -> bool:
    """Whether anybody says what a foreign policy was trained for: its folder, its run, its name, or the caller."""
    return (
        path.is_dir()
        or found.family == "light_wam"
        or wanted.release is not None
        or path.stem in RELEASES
    )


def _named(stats: Path, path: Path) -> str:
    """Statistics for the card: by their name beside the weights, else with their folder's."""
    return (
        f"`{stats.name}`" if stats.parent == path.parent else f"`{stats.parent.name}/{stats.name}`"
    )


def _statistics(path: Path) -> Path:
    """The statistics published beside a file: its own, else its folder's, else those of the run whose folder is above it."""
    own, shared = path.with_name(f"{path.stem}_{STATISTICS}"), path.with_name(STATISTICS)
    runs = [
        place
        for place in light_wam.candidate_paths(path, STATISTICS)
        if place.with_name(light_wam.CONFIG).is_file()
    ]
    return next((place for place in (own, shared, *runs) if place.is_file()), own)


def _dtype(found: ForeignCheckpoint, path: Path) -> DtypeName:
    weights.check_dtype(found.tensors, str(path))
    names: dict[torch.dtype, DtypeName] = {
        torch.float32: "float32",
        torch.bfloat16: "bfloat16",
        torch.float16: "float16",
    }
    dtype = next(iter(found.tensors.values())).dtype
    if dtype not in names:
        raise WeightsError(
            f"{path} stores {dtype}, this package computes in {', '.join(names.values())}"
        )
    return names[dtype]
