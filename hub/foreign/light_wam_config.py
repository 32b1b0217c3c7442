"""Configurations of Light-WAM's own checkpoints, from the `config.yaml` of their training run.

The file is read as data and never executed. Its settings are those of `configs/` in
https://github.com/L1ziang/Light-WAM. See docs/method.md, "Light-WAM" and "Checkpoint formats".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from wam_policy.errors import CheckpointError, ConfigError, WAMPolicyError, WeightsError
from wam_policy.hub.foreign.shapes import infer_light_config
from wam_policy.models.config import LORA_TARGETS, LightWAMConfig
from wam_policy.presets import LIGHT_PRESETS, ReleaseInfo, preset_of
from wam_policy.utils import documents

CONFIG = "config.yaml"

# Folders, from that of the weights upwards, in which a run may keep its files.
PARENTS = 4

# Presets whose names occur in the names of the datasets they were trained on.
ROBOTS = ("libero", "robotwin")

# The run's names of camera layouts and normalisation modes, and this package's.
CANVASES = {"horizontal": "row", "robotwin": "t"}
MODES = {"min/max": "min_max", "z-score": "z_score"}

# The run's names of the features that an adapter records, and this package's.
FEATURES = {
    **dict.fromkeys(("h", "backbone", "base", "frozen"), "backbone"),
    **dict.fromkeys(("h_prime", "hprime", "h'", "adapted", "adapter"), "adapted"),
    "delta": "delta",
}

# The run's names of groups of layers with LoRA, and the layers.
TARGETS = {
    "ffn": ("ffn.0", "ffn.2"),
    "mlp": ("ffn.0", "ffn.2"),
    "ffn_in": ("ffn.0",),
    "ffn_out": ("ffn.2",),
}

# Settings that change what a policy does, with the only value that this package supports.
SUPPORTED_VALUES = {
    "model.wam_adapter.use_wam_adapter": True,
    "model.wam_adapter.remove_original_action_expert": True,
    "model.apply_video_latent_downsample_to_action_branch": False,
    "model.loss.use_first_frame_residual_video_target": False,
    "model.history_memory.enabled": False,
    "data.train.global_sample_stride": 1,
    "data.train.processor.use_stepwise_action_norm": False,
    "data.train.processor.norm_exception_mode": None,
    "data.train.processor.action_state_transforms": None,
}

_ADAPTER = "model.wam_adapter"
_HEAD = "model.state_fusion_action_expert_config"
_WEIGHTING = "model.loss.action_temporal_weighting"


class RunFile:
    """The values of a training run's `config.yaml`, by dotted path."""

    def __init__(self, path: Path) -> None:
        """Read the file; targets and tags in it are never followed.

        Args:
            path: Path of the file.

        Raises:
            CheckpointError: The file is unreadable, or holds more than data.
        """
        self.path = path
        self.data = documents.read_yaml(path, CheckpointError, "download it again")
        if not isinstance(self.data, dict):
            raise CheckpointError(f"{path}: expected a mapping, got {type(self.data).__name__}")

    def get(self, path: str, default: Any = None) -> Any:
        """Return the value at a path.

        Args:
            path: Keys from the root to the value, joined by dots.
            default: Result if the value is absent or None; the value must have its type.

        Raises:
            ConfigError: The value has another type, or is an expression, which nothing here
                evaluates.
        """
        value: Any = self.data
        for part in path.split("."):
            if value is not None and not isinstance(value, Mapping):
                raise ConfigError(
                    f"{self.path}: what holds `{part}` in `{path}` must be a mapping, "
                    f"got {value!r:.100}"
                )
            value = value.get(part) if value is not None else None
            if isinstance(value, str) and "${" in value:
                raise ConfigError(
                    f"{self.path}: `{part}` in `{path}` is {value!r}, an expression; "
                    f"replace it by its value"
                )
        if isinstance(value, list) and any("${" in str(item) for item in value):
            raise ConfigError(
                f"{self.path}: `{path}` holds an expression, {value!r}; replace it by its value"
            )
        if value is None:
            return default
        if default is not None and not _has_type_of(value, default):
            raise ConfigError(
                f"{self.path}: `{path}` must be a {type(default).__name__}, got {value!r:.100}"
            )
        return value

    def need(self, path: str) -> Any:
        """Return the value at a path, which the weights do not determine.

        Args:
            path: Keys from the root to the value, joined by dots.

        Raises:
            ConfigError: The value is absent, or is an expression.
        """
        value = self.get(path)
        if value is None:
            raise ConfigError(
                f"{self.path} does not set `{path}`, which the weights do not determine; add it"
            )
        return value


def _has_type_of(value: Any, default: Any) -> bool:
    """Return whether a value of a document has the type of its default."""
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, (int, float)):
        return isinstance(value, (int, float))
    if isinstance(default, (list, tuple)):
        # A list of one may be written without brackets.
        return isinstance(value, (list, tuple, str))
    return isinstance(value, type(default))


def candidate_paths(path: Path, name: str) -> list[Path]:
    """Return where a file of the run may be, the nearest folder first.

    Args:
        path: File of the weights.
        name: Name of the run's file.
    """
    # Links are not resolved: the Hub's cache links to files without their folders.
    folders = path.absolute().parents[:PARENTS]
    return [folder / name for folder in folders]


def find_run_file(path: Path, name: str) -> Path:
    """Return a file of the run, in the folder of the weights or in one above it.

    Args:
        path: File of the weights.
        name: Name of the run's file.

    Raises:
        CheckpointError: There is no such file.
    """
    for candidate in candidate_paths(path, name):
        if candidate.is_file():
            return candidate
    raise CheckpointError(
        f"no {name} beside {path} or in the {PARENTS - 1} folders above it: a Light-WAM's file "
        f"does not record how it was trained; copy the files of its run too"
    )


def run_model_config(run: RunFile, tensors: Mapping[str, Tensor], head_dim: int) -> LightWAMConfig:
    """Return the configuration of the model, from the tensors' shapes and the run's file.

    Args:
        run: Configuration of the run.
        tensors: Weights of the policy, by native names.
        head_dim: Width of an attention head.

    Raises:
        ConfigError: The run's file contradicts the shapes.
        WeightsError: The weights are incomplete.
    """
    try:
        inferred = infer_light_config(tensors, head_dim)
        return _model_config(run, inferred)
    except (TypeError, ValueError, AttributeError) as error:
        # Errors of this package explain themselves.
        if isinstance(error, WAMPolicyError):
            raise
        raise ConfigError(f"{run.path} holds a value of an unexpected type: {error}") from error


def _model_config(run: RunFile, inferred: Mapping[str, Any]) -> LightWAMConfig:
    """Return the configuration of the model, after comparing the run's file with the shapes.

    Args:
        run: Configuration of the run.
        inferred: Fields of the configuration that the shapes determine.
    """
    recorded = _recorded_fields(run, inferred)
    for name, value in recorded.items():
        if value is not None and name in inferred and value != inferred[name]:
            raise ConfigError(
                f"{run.path} has {name} {value!r}, but the weights have {inferred[name]!r}: "
                f"the two belong to different runs"
            )

    # What the shapes do not determine comes from the run's file.
    fields: dict[str, Any] = {
        "features": recorded["features"] or (("adapted",),) * len(inferred["taps"]),
        "adapter_scale": float(run.get(f"{_ADAPTER}.adapter_scale", 1.0)),
        "video_pool": run.get("model.video_latent_spatial_downsample_factor", 1),
    }
    if inferred["lora_rank"]:
        fields["lora_alpha"] = float(run.need(f"{_ADAPTER}.lora_alpha"))
    if inferred["pooling"] == "learned_query":
        fields["pool_heads"] = run.need(f"{_HEAD}.token_pooling_num_heads")

    proprio_dim = run.get("data.train.processor.proprio_output_dim")
    if proprio_dim is not None and proprio_dim != inferred["proprio_dim"]:
        raise WeightsError(
            f"{run.path} has {proprio_dim} numbers of proprioception, but the weights hold an "
            f"encoder of {inferred['proprio_dim']}: the policy would ignore its state"
        )
    return LightWAMConfig(**{**fields, **inferred})


def _recorded_fields(run: RunFile, inferred: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields of the model's configuration as the run's file has them.

    Args:
        run: Configuration of the run.
        inferred: Fields of the configuration that the shapes determine.

    Returns:
        Values by field; None where the file has none.
    """
    taps = run.get(f"{_ADAPTER}.adapter_layer_indices", inferred["taps"])
    fields: dict[str, Any] = {
        "taps": tuple(sorted(set(taps))),
        "adapter_dim": run.get(f"{_ADAPTER}.adapter_dim"),
        "lora_rank": 0,
        "lora_targets": None,
        "layer_dim": run.get(f"{_HEAD}.per_layer_dim"),
        "trunk_dim": run.get(f"{_HEAD}.trunk_dim"),
        "trunk_blocks": run.get(f"{_HEAD}.num_trunk_blocks"),
        "pooling": run.get(f"{_HEAD}.token_pooling_type"),
        "queries": None,
        "features": features(
            run.get(f"{_HEAD}.layer_feature_sources"),
            run.get(f"{_HEAD}.feature_sources"),
            len(inferred["taps"]),
        ),
    }
    if run.get(f"{_ADAPTER}.use_backbone_lora", bool(inferred["lora_rank"])):
        fields["lora_rank"] = run.get(f"{_ADAPTER}.lora_rank")
        fields["lora_targets"] = targets(run.get(f"{_ADAPTER}.lora_target_modules"))
    if inferred["pooling"] == "learned_query":
        fields["queries"] = run.get(f"{_HEAD}.token_pooling_num_queries")
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }


def _split_names(names: Any) -> list[str]:
    """Return names, which are in a list or in one string with commas, in lower case."""
    if isinstance(names, str):
        names = names.split(",")
    return [name.strip().lower() for name in names]


def targets(names: Any) -> tuple[str, ...] | None:
    """Return the layers with LoRA, in the order of `LORA_TARGETS`.

    Args:
        names: The run's names of layers or groups of layers, in a list or separated by commas;
            None if the run has none.

    Returns:
        Native names of the layers; None if `names` is None.

    Raises:
        ConfigError: A layer is unknown.
    """
    if names is None:
        return None
    layers: set[str] = set()
    for name in _split_names(names):
        layers.update(TARGETS.get(name, (name,)))

    unknown = layers - set(LORA_TARGETS)
    if unknown:
        known = ", ".join((*LORA_TARGETS, *TARGETS))
        raise ConfigError(f"LoRA on unknown layers {sorted(unknown)}; expected some of {known}")
    return tuple(target for target in LORA_TARGETS if target in layers)


def features(per_tap: Any, common: Any, taps: int) -> tuple[tuple[Any, ...], ...] | None:
    """Return the features that the action head reads from each tap.

    Args:
        per_tap: The run's names of features, for each tap; None to use `common`.
        common: The run's names of features for all taps.
        taps: Number of taps.

    Returns:
        Native names of the features for each tap; None if the run has none.

    Raises:
        ConfigError: A feature is unknown.
    """
    if per_tap is None and common is None:
        return None
    if per_tap is None:
        per_tap = [common] * taps
    names_by_tap = [_split_names(names) for names in per_tap]

    unknown = {name for names in names_by_tap for name in names} - FEATURES.keys()
    if unknown:
        raise ConfigError(
            f"unknown features {sorted(unknown)}; expected some of {', '.join(FEATURES)}"
        )

    # Several names may stand for one feature: keep the first.
    native = []
    for names in names_by_tap:
        native.append(tuple(dict.fromkeys(FEATURES[name] for name in names)))
    return tuple(native)


def run_release(run: RunFile, given: ReleaseInfo | None) -> tuple[ReleaseInfo, dict[str, str]]:
    """Return what a policy was trained for, from its run's file and the caller.

    Args:
        run: Configuration of the run.
        given: The caller's information, which takes precedence; None for none.

    Returns:
        The information, and a description of where it came from.

    Raises:
        CheckpointError: The run has settings that this package does not support.
        ConfigError: The robot is unknown, or the run's file contradicts the robot's preset.
    """
    # Refuse settings that would change what the policy does.
    for path, supported in SUPPORTED_VALUES.items():
        value = run.get(path, supported)
        if value != supported:
            raise CheckpointError(
                f"{run.path}: `{path}` is {value!r}, but this package supports only {supported!r}"
            )
    if given is not None and (given.variant is not None or given.action_shift is not None):
        raise ConfigError("a Light-WAM has neither a variant nor an action shift: leave both out")

    # The datasets' names tell the robot, unless the caller does.
    datasets = _dataset_names(run)
    robot = _robot_of(datasets) if given is None else given.preset
    if robot is None:
        raise ConfigError(
            f"{run.path} was trained on {datasets or 'unnamed data'}, which does not determine "
            f"the robot; pass --preset {'|'.join(LIGHT_PRESETS)}|robot.json"
        )
    _check_preset(run, robot)

    release = ReleaseInfo(preset=robot) if given is None else given
    supervised_steps = _supervised_steps(run)
    if release.supervised_steps is not None:
        supervised_steps = release.supervised_steps
    trained_on = release.trained_on or _describe_data(datasets, robot)
    release = replace(release, supervised_steps=supervised_steps, trained_on=trained_on)
    return release, {"contract": f"`{run.path.name}`, preset `{robot}`"}


def _dataset_names(run: RunFile) -> list[str]:
    """Return the names of the datasets that a policy was trained on."""
    folders = run.get("data.train.dataset_dirs", [])
    if isinstance(folders, str):
        folders = [folders]
    if not isinstance(folders, list) or not all(isinstance(name, str) for name in folders):
        raise ConfigError(
            f"{run.path}: `data.train.dataset_dirs` must be a list of folders, got {folders!r}"
        )
    return [Path(str(folder)).name for folder in folders]


def _robot_of(datasets: list[str]) -> str | None:
    """Return the robot whose name occurs in all names of datasets; None if there is none."""
    for robot in ROBOTS:
        if datasets and all(robot in name for name in datasets):
            return robot
    return None


def _supervised_steps(run: RunFile) -> int | None:
    """Return how many first actions of a chunk were trained; None for all."""
    if not run.get(f"{_WEIGHTING}.enabled", False):
        return None
    steps: int = run.need(f"{_WEIGHTING}.num_prefix_steps")

    # The steps after the prefix are trained too unless their losses have no weight.
    tail_weight = run.get(f"{_WEIGHTING}.tail_weight", 1.0)
    return steps if tail_weight == 0 else None


def _describe_data(datasets: list[str], robot: str) -> str | None:
    """Describe the training data for the card; None for unnamed data."""
    if robot == "libero" and len(datasets) == 1:
        suite = re.sub(r"_no_noops.*", "", datasets[0])
        return f"{datasets[0]}: the suite {suite} only; there is one checkpoint per suite"
    return ", ".join(datasets) or None


def _check_preset(run: RunFile, robot: str) -> None:
    """Check that the settings of a run are those of a robot's preset.

    Args:
        run: Configuration of the run.
        robot: Name or file of a preset.

    Raises:
        ConfigError: A setting differs.
    """
    preset = preset_of("light_wam", robot)
    layout = preset.cameras.layout

    # In the T layout, the head camera has twice the size of the wrists', above them.
    rows = 3 if layout == "t" else 1
    canvas = [rows * preset.cameras.height, 2 * preset.cameras.width]
    run_layouts = {native: name for name, native in CANVASES.items()}
    run_modes = {native: name for name, native in MODES.items()}
    expected = {
        "concat_multi_camera": run_layouts[layout],
        "video_size": canvas,
        "num_frames": preset.horizon + 1,
        "action_video_freq_ratio": preset.video.stride,
        "context_len": preset.prompt.token_length,
        "processor.norm_default_mode": run_modes[preset.normalization],
    }
    for name, value in expected.items():
        recorded = run.get(f"data.train.{name}", value)
        if recorded != value:
            raise ConfigError(
                f"{run.path}: `data.train.{name}` is {recorded!r}, "
                f"but the preset {robot!r} has {value!r}"
            )
