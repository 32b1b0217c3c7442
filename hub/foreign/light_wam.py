"""Reads Light-WAM's own checkpoints: their contract is in the run's `config.yaml`, which is read as data and never executed.

Source: spec/lightwam.md sections 1.1, 2.1 and 5.1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from wam_policy.errors import CheckpointError, ConfigError, WAMPolicyError, WeightsError
from wam_policy.hub.foreign.shapes import infer_light_config
from wam_policy.models.config import LORA_TARGETS, LightWAMConfig
from wam_policy.presets import LIGHT_PRESETS, ReleaseInfo

CONFIG = "config.yaml"
PARENTS = 4  # folders above the weights in which a run keeps its files
ROBOTS = ("libero", "robotwin")  # presets that a run's data is named after
CANVASES = {"horizontal": "row", "robotwin": "t"}
MODES = {"min/max": "min_max", "z-score": "z_score"}
FEATURES = {  # upstream's names of what a tap records
    **dict.fromkeys(("h", "backbone", "base", "frozen"), "backbone"),
    **dict.fromkeys(("h_prime", "hprime", "h'", "adapted", "adapter"), "adapted"),
    "delta": "delta",
}
TARGETS = {
    "ffn": ("ffn.0", "ffn.2"),
    "mlp": ("ffn.0", "ffn.2"),
    "ffn_in": ("ffn.0",),
    "ffn_out": ("ffn.2",),
}  # of LoRA
UNREAD = {  # settings that change what the policy does, and the only value of each that this package reads
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


class RunFile:
    """The values of a `config.yaml`, by dotted path."""

    def __init__(self, path: Path) -> None:
        """Read the file; targets and tags in it are never followed.

        Raises:
            CheckpointError: it can't be read, or holds more than data.
        """
        self.path = path
        try:
            self.data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} can't be read: {error}") from error
        except yaml.YAMLError as error:
            raise CheckpointError(
                f"{path} isn't plain data, nothing in it is executed: {error!s:.300}"
            ) from error
        if not isinstance(self.data, dict):
            raise CheckpointError(f"{path} must hold a mapping, got {type(self.data).__name__}")

    def get(self, path: str, default: Any = None) -> Any:
        """The value at a path; None in the file counts as not said.

        Raises:
            ConfigError: the value is an expression that somebody would have to evaluate.
        """
        value: Any = self.data
        for part in path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
            if isinstance(value, str) and "${" in value:
                raise ConfigError(
                    f"{self.path}: `{part}` in `{path}` is {value!r}, an expression; write what it stands for"
                )
        if isinstance(value, list) and any("${" in str(item) for item in value):
            raise ConfigError(
                f"{self.path}: `{path}` holds an expression, {value!r}; write what it stands for"
            )
        return default if value is None else value

    def need(self, path: str) -> Any:
        """The value at a path, which nothing else tells.

        Raises:
            ConfigError: it isn't there, or is an expression.
        """
        value = self.get(path)
        if value is None:
            raise ConfigError(
                f"{self.path} doesn't say `{path}`, which the weights don't tell; write it there"
            )
        return value


def candidate_paths(path: Path, name: str) -> list[Path]:
    """Where a run's file may be, the nearest place first."""
    return [
        folder / name for folder in path.absolute().parents[:PARENTS]
    ]  # not resolved: the Hub's cache holds links


def find_run_file(path: Path, name: str) -> Path:
    """A run's file, in the folder of the weights or in one of those above it.

    Raises:
        CheckpointError: there is none.
    """
    found = next((place for place in candidate_paths(path, name) if place.is_file()), None)
    if found is not None:
        return found
    raise CheckpointError(
        f"no {name} beside {path} or in the {PARENTS - 1} folders above it: a Light-WAM's file doesn't say how it was trained, "
        f"take the files of its run too"
    )


def run_model_config(run: RunFile, tensors: Mapping[str, Tensor], head_dim: int) -> LightWAMConfig:
    """The sizes of the model: what the shapes tell, and of the rest what the file says.

    Raises:
        ConfigError: the file says another thing than the shapes.
        WeightsError: the weights are incomplete.
    """
    try:
        return _sizes(run, infer_light_config(tensors, head_dim))
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, WAMPolicyError):
            raise
        raise ConfigError(
            f"{run.path} holds a value of another kind than it should: {error}"
        ) from error


def _sizes(run: RunFile, found: Mapping[str, Any]) -> LightWAMConfig:
    adapter, head = "model.wam_adapter.", "model.state_fusion_action_expert_config."
    uses_lora = run.get(f"{adapter}use_backbone_lora", bool(found["lora_rank"]))
    said = {
        "taps": sorted(set(run.get(f"{adapter}adapter_layer_indices", found["taps"]))),
        "adapter_dim": run.get(f"{adapter}adapter_dim"),
        "lora_rank": run.get(f"{adapter}lora_rank") if uses_lora else 0,
        "lora_targets": targets(run.get(f"{adapter}lora_target_modules")) if uses_lora else None,
        "layer_dim": run.get(f"{head}per_layer_dim"),
        "trunk_dim": run.get(f"{head}trunk_dim"),
        "trunk_blocks": run.get(f"{head}num_trunk_blocks"),
        "pooling": run.get(f"{head}token_pooling_type"),
        "queries": run.get(f"{head}token_pooling_num_queries")
        if found["pooling"] == "learned_query"
        else None,
        "features": features(
            run.get(f"{head}layer_feature_sources"),
            run.get(f"{head}feature_sources"),
            len(found["taps"]),
        ),
    }
    for name, value in said.items():
        value = tuple(value) if isinstance(value, list) else value
        if value is not None and name in found and value != found[name]:
            raise ConfigError(
                f"{run.path} says {name} {value!r}, the weights are of {found[name]!r}: they are of two runs"
            )
    rest = {
        "features": said["features"] or (("adapted",),) * len(found["taps"]),
        "adapter_scale": float(run.get(f"{adapter}adapter_scale", 1.0)),
        "video_pool": run.get("model.video_latent_spatial_downsample_factor", 1),
    }
    if found["lora_rank"]:
        rest["lora_alpha"] = float(run.need(f"{adapter}lora_alpha"))
    if found["pooling"] == "learned_query":
        rest["pool_heads"] = run.need(f"{head}token_pooling_num_heads")
    proprio = run.get("data.train.processor.proprio_output_dim")
    if proprio is not None and proprio != found["proprio_dim"]:
        raise WeightsError(
            f"{run.path} says {proprio} numbers of proprioception, the weights hold an encoder of {found['proprio_dim']}: "
            f"without it the policy would act blindly to its state"
        )
    return LightWAMConfig(**{**rest, **found})


def _listed(names: Any) -> list[str]:
    """Names in a list, or in one string with commas."""
    return [
        name.strip().lower() for name in (names.split(",") if isinstance(names, str) else names)
    ]


def targets(names: Any) -> tuple[str, ...] | None:
    """The layers that LoRA is on, in our order; None: nothing is said.

    Raises:
        ConfigError: a name of no layer.
    """
    if names is None:
        return None
    expanded = {target for name in _listed(names) for target in TARGETS.get(name, (name,))}
    if unknown := expanded - set(LORA_TARGETS):
        raise ConfigError(
            f"LoRA on unknown layers {sorted(unknown)}; there are {', '.join((*LORA_TARGETS, *TARGETS))}"
        )
    return tuple(target for target in LORA_TARGETS if target in expanded)


def features(per_tap: Any, common: Any, taps: int) -> tuple[tuple[Any, ...], ...] | None:
    """What the head reads of each tap, from upstream's lists per tap, or for all of them; None: nothing is said.

    Raises:
        ConfigError: a name of nothing that is recorded.
    """
    if per_tap is None and common is None:
        return None
    read = [_listed(names) for names in ([common] * taps if per_tap is None else per_tap)]
    if unknown := {name for names in read for name in names} - FEATURES.keys():
        raise ConfigError(f"unknown features {sorted(unknown)}; there are {', '.join(FEATURES)}")
    return tuple(tuple(dict.fromkeys(FEATURES[name] for name in names)) for names in read)


def run_release(run: RunFile, given: ReleaseInfo | None) -> tuple[ReleaseInfo, dict[str, str]]:
    """What the file says of the policy's contract, and where each part of it came from; what is `given` counts before it.

    Raises:
        CheckpointError: settings this package doesn't read.
        ConfigError: nobody says which robot it was trained for, or the file contradicts that robot's contract.
    """
    for path, only in UNREAD.items():
        if run.get(path, only) != only:
            raise CheckpointError(
                f"{run.path}: `{path}` is {run.get(path)!r}, this package reads only {only!r}"
            )
    if given is not None and (given.variant is not None or given.action_shift is not None):
        raise ConfigError("a Light-WAM has neither a variant nor an action shift: leave both out")
    folders = run.get("data.train.dataset_dirs", [])
    data = [
        Path(str(folder)).name for folder in ([folders] if isinstance(folders, str) else folders)
    ]
    robot = (
        given.preset
        if given is not None
        else next((r for r in ROBOTS if data and all(r in name for name in data)), None)
    )
    if robot is None:
        raise ConfigError(
            f"{run.path} was trained on {data or 'unnamed data'}, which doesn't tell the robot; say it: "
            f"--preset {'|'.join(LIGHT_PRESETS)}"
        )
    _compare(run, robot)
    weighting = "model.loss.action_temporal_weighting."
    prefix = (
        run.need(f"{weighting}num_prefix_steps") if run.get(f"{weighting}enabled", False) else None
    )
    supervised = prefix if run.get(f"{weighting}tail_weight", 1.0) == 0 else None
    if given is not None and given.supervised_steps is not None:
        supervised = given.supervised_steps
    words = ", ".join(data) or None
    if robot == "libero" and len(data) == 1:
        suite = re.sub(r"_no_noops.*", "", data[0])
        words = f"{data[0]}: the suite {suite} only; there is one checkpoint per suite"
    said = ReleaseInfo(preset=robot) if given is None else given
    said = replace(said, supervised_steps=supervised, trained_on=said.trained_on or words)
    return said, {"contract": f"`{run.path.name}`, preset `{robot}`"}


def _compare(run: RunFile, robot: str) -> None:
    """Refuse a run whose settings are not those of the robot's contract."""
    preset = LIGHT_PRESETS[robot]
    layout, canvas = preset.cameras.layout, [preset.cameras.height, 2 * preset.cameras.width]
    canvas[0] *= 3 if layout == "t" else 1
    expected = {
        "concat_multi_camera": next(theirs for theirs, ours in CANVASES.items() if ours == layout),
        "video_size": canvas,
        "num_frames": preset.horizon + 1,
        "action_video_freq_ratio": preset.video.stride,
        "context_len": preset.prompt.token_length,
        "processor.norm_default_mode": next(
            theirs for theirs, ours in MODES.items() if ours == preset.normalization
        ),
    }
    for name, value in expected.items():
        if (found := run.get(f"data.train.{name}", value)) != value:
            raise ConfigError(
                f"{run.path}: `data.train.{name}` is {found!r}, the contract of {robot!r} has {value!r}"
            )
