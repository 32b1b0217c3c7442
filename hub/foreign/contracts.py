"""Configurations of other projects' checkpoints.

They come from files beside the weights, from a known release, or from the caller. See
docs/method.md, "Checkpoint formats".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from wam_policy.config import DtypeName, PolicyConfig
from wam_policy.errors import CheckpointError, ConfigError, WeightsError
from wam_policy.hub import dataset_stats, weights
from wam_policy.hub.foreign import lerobot_config, light_wam_config
from wam_policy.hub.foreign.identify import ForeignCheckpoint
from wam_policy.hub.foreign.shapes import infer_config
from wam_policy.hub.request import STATISTICS, CheckpointRequest, refuse_release_info
from wam_policy.models.config import FastWAMConfig, LightWAMConfig
from wam_policy.presets import PRESETS, RELEASES, ReleaseInfo, preset_of, release_config


def foreign_config(
    foreign: ForeignCheckpoint, path: Path, request: CheckpointRequest
) -> tuple[PolicyConfig, Mapping[str, str]]:
    """Return the configuration of a foreign policy.

    Args:
        foreign: Content of the checkpoint.
        path: File or folder of the checkpoint.
        request: Request for the checkpoint.

    Returns:
        The configuration, and a description of where each part of it came from.

    Raises:
        CheckpointError: Statistics are missing or do not fit, or it is unknown what the policy was
            trained for.
        ConfigError: The caller's information contradicts the weights.
    """
    config, origin = _foreign_config(foreign, path, request)
    try:
        # Entries of other projects' files have any type: check them like those of our own file.
        return PolicyConfig.from_json(config.to_json()), origin
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is described by an impossible entry ({error})") from error


def _foreign_config(
    foreign: ForeignCheckpoint, path: Path, request: CheckpointRequest
) -> tuple[PolicyConfig, Mapping[str, str]]:
    """Return the configuration of a foreign policy before its types are checked."""
    # LeRobot's folders and Light-WAM's runs describe themselves.
    if path.is_dir():
        refuse_release_info(path, request)
        sizes = infer_config(foreign.tensors, lerobot_config.head_dim(path))
        return lerobot_config.read_policy_config(path, FastWAMConfig(**sizes))
    if foreign.family == "light_wam":
        return _light_wam_config(foreign, path, request)

    # A file of Fast-WAM's does not: it is a known release, or the caller describes it.
    release = request.release or RELEASES.get(path.stem)
    if release is None or release.variant is None or release.action_shift is None:
        raise CheckpointError(
            f"{path.name} does not record what it was trained for, and is not a known release "
            f"({', '.join(RELEASES)}); pass from_pretrained(…, release=ReleaseInfo(preset=…, "
            f"variant=…, action_shift=…)), or run "
            f"wam convert --preset {'|'.join(PRESETS)}|robot.json --variant … --action-shift …"
        )
    model = FastWAMConfig(**infer_config(foreign.tensors, release.head_dim))
    stats = request.stats or _find_statistics(path)
    config = _release_config(foreign, path, release, model, stats)

    decided_by = "given by the caller"
    if request.release is None:
        decided_by = "release of this name"
    description = (
        f"preset `{release.preset}`, variant `{release.variant}`, "
        f"action shift {release.action_shift:g} ({decided_by})"
    )
    return config, {"contract": description, "statistics": _describe_file(stats, path)}


def _light_wam_config(
    foreign: ForeignCheckpoint, path: Path, request: CheckpointRequest
) -> tuple[PolicyConfig, Mapping[str, str]]:
    """Return the configuration of a Light-WAM, and where each part of it came from."""
    run = light_wam_config.RunFile(light_wam_config.find_run_file(path, light_wam_config.CONFIG))
    release, origin = light_wam_config.run_release(run, request.release)
    model = light_wam_config.run_model_config(run, foreign.tensors, release.head_dim)
    stats = request.stats or light_wam_config.find_run_file(path, STATISTICS)
    config = _release_config(foreign, path, release, model, stats)
    return config, {**origin, "statistics": _describe_file(stats, path)}


def _release_config(
    foreign: ForeignCheckpoint,
    path: Path,
    release: ReleaseInfo,
    model: FastWAMConfig | LightWAMConfig,
    stats: Path,
) -> PolicyConfig:
    """Return the configuration of a reference implementation's file.

    Args:
        foreign: Content of the file.
        path: Path of the file.
        release: What the policy was trained for.
        model: Configuration of the model.
        stats: File of the dataset statistics.

    Raises:
        CheckpointError: Statistics are missing or do not fit.
        ConfigError: The policy was not trained for that preset.
        WeightsError: A proprio encoder is missing or unexpected, or the dtype is not supported.
    """
    # Without its proprio encoder, the policy would ignore its state.
    preset = preset_of(foreign.family, release.preset)
    has_proprio = model.proprio_dim is not None
    if release.proprio != has_proprio:
        raise WeightsError(_proprio_message(path, expected=release.proprio))

    # A gripper that snaps to its closed end needs the range of the training data.
    state = None
    if model.proprio_dim is not None:
        state = dataset_stats.read_normalization(
            stats,
            "state",
            preset.normalization,
            model.proprio_dim,
            groups=release.state_groups,
        )
    also = () if preset.snap is None else ("min", "max")
    action = dataset_stats.read_normalization(
        stats,
        "action",
        preset.normalization,
        model.action_dim,
        also,
        groups=release.action_groups,
    )

    try:
        dtype = _stored_dtype(foreign, path)
        return release_config(release, model, state=state, action=action, dtype=dtype)
    except ConfigError as error:
        raise ConfigError(_preset_message(path, release.preset, error)) from error


def _preset_message(path: Path, preset: str, error: Exception) -> str:
    """Return the error message for a policy of another robot than its preset's."""
    return (
        f"{path} was not trained for the preset {preset!r}: {error}; describe your own robot in a "
        f"JSON file with the fields of wam_policy.presets.Preset, and pass its path as the preset"
    )


def _proprio_message(path: Path, expected: bool) -> str:
    """Return the error message for a proprio encoder that is missing, or not expected."""
    problem = "holds a proprio encoder, but the policy was trained without one"
    option = "--proprio"
    if expected:
        problem = "holds no proprio encoder, but the policy was trained with one"
        option = "--no-proprio"
    return (
        f"{path} {problem}: the file is partial or of another policy; if it was trained like this, "
        f"pass ReleaseInfo(…, proprio={not expected}), or wam convert {option}"
    )


def release_is_known(foreign: ForeignCheckpoint, path: Path, request: CheckpointRequest) -> bool:
    """Return whether it is known what a foreign policy was trained for.

    Args:
        foreign: Content of the checkpoint.
        path: File or folder of the checkpoint.
        request: Request for the checkpoint.
    """
    recorded = path.is_dir() or foreign.family == "light_wam"
    return recorded or request.release is not None or path.stem in RELEASES


def _describe_file(stats: Path, path: Path) -> str:
    """Return the name of a file of statistics for the card, with its folder if not the weights'."""
    if stats.parent == path.parent:
        return f"`{stats.name}`"
    return f"`{stats.parent.name}/{stats.name}`"


def _find_statistics(path: Path) -> Path:
    """Return the file of statistics for a file of weights.

    The file's own statistics come first, then those of its folder, then those of a training run
    whose folder is above it.

    Args:
        path: File of the weights.

    Returns:
        The first existing file; the file's own statistics if there is none.
    """
    default = path.with_name(f"{path.stem}_{STATISTICS}")
    candidates = [default, path.with_name(STATISTICS)]

    # A folder above that has no run configuration may hold another policy's statistics.
    for candidate in light_wam_config.candidate_paths(path, STATISTICS):
        if candidate.with_name(light_wam_config.CONFIG).is_file():
            candidates.append(candidate)
    return next((candidate for candidate in candidates if candidate.is_file()), default)


def _stored_dtype(foreign: ForeignCheckpoint, path: Path) -> DtypeName:
    """Return the dtype of a checkpoint's tensors, after checking that it is one and supported."""
    weights.check_dtype(foreign.tensors, str(path))
    dtype = next(iter(foreign.tensors.values())).dtype
    return cast(DtypeName, str(dtype).removeprefix("torch."))
