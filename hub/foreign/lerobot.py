"""Reads LeRobot's `fastwam` checkpoints: their contract is in `config.json` and in the files of their processors.

Source: spec/fastwam.md sections 1.4, 5.2 and 8.2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from wam_policy.config import (
    ActionConfig,
    CameraConfig,
    PolicyConfig,
    PromptConfig,
    SamplingConfig,
    Source,
    StateConfig,
    VideoConfig,
)
from wam_policy.contract import ActionLayout, Gripper
from wam_policy.errors import CheckpointError, ConfigError, WAMPolicyError, WeightsError
from wam_policy.hub import weights
from wam_policy.models.config import FastWAMConfig
from wam_policy.normalize import Mode, Normalization, required_statistics
from wam_policy.presets import PRESETS, WAN, Preset

CAMERA, STATE, ACTION = "observation.images.", "observation.state", "action"
MODES: dict[str, Mode] = {
    "IDENTITY": "identity",
    "MIN_MAX": "min_max",
    "MEAN_STD": "z_score",
    "QUANTILES": "quantile",
}
TOKENIZER = "google/umt5-xxl"
RENAME, TOGGLE = (
    "rename_observations_processor",
    "fastwam_action_toggle_processor",
)  # steps of the processors
UNREAD = {  # settings that change what the policy does, and the only value of each that this package reads
    "n_obs_steps": 1,
    "use_relative_actions": False,
    "text_cfg_scale": 1.0,
}


class ProcessorStatistics:
    """What the processors' files say: a mode per kind of feature, and statistics per feature."""

    def __init__(self, folder: Path, pipeline: str, step: str) -> None:
        """Read the step `step` of the pipeline `pipeline` ("policy_preprocessor" or "policy_postprocessor").

        Raises:
            CheckpointError: there is no such file, or no such step in it.
        """
        self.path = folder / f"{pipeline}.json"
        self.steps = {
            s.get("registry_name"): s.get("config") or {} for s in _json(self.path).get("steps", [])
        }
        found = next(
            (s for s in _json(self.path).get("steps", []) if s.get("registry_name") == step), None
        )
        if found is None or "state_file" not in found or "norm_map" not in self.steps[step]:
            raise CheckpointError(
                f"{self.path} holds no statistics (a step {step!r} with a `state_file`): without them actions mean nothing; "
                f"take the checkpoint's processor files too"
            )
        self.modes: Mapping[str, str] = self.steps[step]["norm_map"]
        self.tensors: dict[str, Tensor] = weights.read_weights_file(
            folder / Path(found["state_file"]).name
        )

    def mode(self, kind: str) -> Mode:
        """How features of a kind ("VISUAL", "STATE", "ACTION") are normalised."""
        name = self.modes.get(kind, "IDENTITY")
        if name not in MODES:
            raise CheckpointError(
                f"{self.path}: this package doesn't read the normalisation {name!r} of {kind}"
            )
        return MODES[name]

    def normalization(self, kind: str, feature: str) -> Normalization:
        """How one feature is normalised.

        Raises:
            CheckpointError: its statistics are missing (LeRobot would pass it through as it is).
        """
        mode = self.mode(kind)
        missing = [
            name for name in required_statistics(mode) if f"{feature}.{name}" not in self.tensors
        ]
        if missing:
            raise CheckpointError(
                f"{self.path}: {feature} is normalised by {mode}, but its {' and '.join(missing)} is missing"
            )
        values = {
            name: tuple(map(float, self.tensors[f"{feature}.{name}"].flatten().tolist()))
            for name in required_statistics(mode)
        }
        return Normalization(mode=mode, statistics=values, rule="lerobot")


def is_lerobot(folder: Path) -> bool:
    """Whether a folder is a Fast-WAM of LeRobot's.

    Raises:
        CheckpointError: it is another policy of LeRobot's.
    """
    path = folder / "config.json"
    config = _json(path) if path.is_file() else {}
    if "format_version" in config or "type" not in config:
        return False
    if config["type"] != "fastwam":
        raise CheckpointError(
            f"{folder} is a LeRobot policy of type {config['type']!r}; this package reads 'fastwam'"
        )
    return True


def head_dim(folder: Path) -> int:
    """Width of an attention head, which the weights don't tell."""
    return int(
        (_json(folder / "config.json").get("action_dit_config") or {}).get("attn_head_dim", 128)
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold an object, got {type(data).__name__}")
    return data


def lerobot_config(folder: Path, sizes: FastWAMConfig) -> tuple[PolicyConfig, dict[str, str]]:
    """The contract of a LeRobot folder, and where each part of it came from.

    Args:
        folder: the folder.
        sizes: of the model in it.

    Raises:
        CheckpointError: missing processor files or statistics, or settings this package doesn't know.
        ConfigError: entries that can't be right.
    """
    config = _json(folder / "config.json")
    for name, only in UNREAD.items():
        if config.get(name, only) != only:
            raise CheckpointError(
                f"{folder}: `{name}` is {config[name]!r}, this package reads only {only!r}"
            )
    for name, dim in (("action_dim", sizes.action_dim), ("proprio_dim", sizes.proprio_dim)):
        if config.get(name, dim) != dim:
            raise WeightsError(
                f"{folder}: `{name}` is {config[name]!r}, the weights have {dim or 'no such part'}: partial, or another's"
            )
    before = ProcessorStatistics(folder, "policy_preprocessor", "normalizer_processor")
    after = ProcessorStatistics(folder, "policy_postprocessor", "unnormalizer_processor")
    try:
        return _contract(config, sizes, before, after)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, WAMPolicyError):
            raise
        raise CheckpointError(f"{folder}/config.json is incomplete: {error!r}") from error


def _contract(
    config: Mapping[str, Any],
    sizes: FastWAMConfig,
    before: ProcessorStatistics,
    after: ProcessorStatistics,
) -> tuple[PolicyConfig, dict[str, str]]:
    origin = {
        "contract": "`config.json`",
        "statistics": f"`{before.path.name}`, `{after.path.name}` and their tensors",
    }
    cameras = _cameras(config, sizes)
    if cameras.layout == "t":
        origin["cameras"] = (
            f"{', '.join(cameras.names)}, composed here; the checkpoint takes them as one picture"
        )
    if renamed := before.steps.get(RENAME, {}).get(
        "rename_map"
    ):  # an env's names onto those of config.json, which count here
        if own := sorted(set(renamed) & set(config["input_features"])):
            raise CheckpointError(
                f"{before.path} renames {own}, which are the policy's own names: cameras would be swapped"
            )
        origin["names"] = f"those of `config.json`; LeRobot renamed {', '.join(map(repr, renamed))}"
    if _normalised_twice(before, config["input_features"]):
        origin["pixels"] = (
            "scaled to [-1, 1] once: the preprocessor's mean and deviation of 0.5 would do it a second time"
        )
    tokenizer, encoder = (
        config.get("tokenizer_model_id", TOKENIZER),
        config.get("text_encoder_model_id", WAN),
    )
    if tokenizer != TOKENIZER:
        origin["tokenizer"] = f"that of `{WAN}`; the checkpoint names {tokenizer!r}"
    if encoder != WAN:
        origin["text encoder"] = f"`{WAN}`; the checkpoint names {encoder!r}"
    ratio, horizon = config.get("action_video_freq_ratio", 4), config.get("action_horizon", 32)
    video_shift, action_shift = (
        config.get("sigma_shift") or config.get(f"{part}_scheduler", {}).get("infer_shift", 5.0)
        for part in ("video", "action")
    )
    seed = config.get("inference_seed", 42)
    state = None
    if sizes.proprio_dim is not None:
        state = StateConfig(
            names=_state_names(sizes), normalization=before.normalization("STATE", STATE)
        )
    layout = _layout(config, sizes, after)
    policy = PolicyConfig(
        model=sizes,
        cameras=cameras,
        video=VideoConfig(
            frames=(config.get("num_video_frames", 33) - 1) // ratio + 1, stride=ratio
        ),
        state=state,
        action=ActionConfig(
            layout=layout,
            normalization=after.normalization("ACTION", ACTION),
            horizon=horizon,
            replan=config.get("n_action_steps", horizon),
        ),
        prompt=PromptConfig(
            template=config["prompt_template"], token_length=config.get("tokenizer_max_len", 128)
        ),
        sampling=SamplingConfig(
            steps=config.get("num_inference_steps", 10),
            video_shift=video_shift,
            action_shift=action_shift,
            seed=42 if seed is None else seed,
            noise="fresh" if seed is None else "fixed",
        ),
        vae=Source(repo=WAN, subfolder="vae"),
        text=Source(repo=WAN),
        dtype=config.get("torch_dtype", "bfloat16").removeprefix("torch."),
        precision="reference",
    )
    return policy, origin


def _cameras(config: Mapping[str, Any], sizes: FastWAMConfig) -> CameraConfig:
    """The cameras side by side, in the order of their names; or the preset's, where one picture is its T."""
    names = sorted(
        name.removeprefix(CAMERA) for name in config["input_features"] if name.startswith(CAMERA)
    )
    height, width = config["image_size"]
    preset = _preset(sizes)
    if preset is not None and len(names) == 1 and preset.cameras.layout == "t":
        whole = (3 * preset.cameras.height, 2 * preset.cameras.width)
        if (height, width) == whole:
            return preset.cameras
    if not names:
        raise ConfigError(
            f"`input_features` names no camera: one that begins with {CAMERA!r} is needed"
        )
    if width % len(names):
        raise ConfigError(
            f"a canvas {width} wide can't hold {len(names)} cameras of one width: {names}"
        )
    return CameraConfig(
        names=tuple(names),
        height=height,
        width=width // len(names),
        resize="stretch",
        pixels="float",
    )


def _preset(sizes: FastWAMConfig) -> Preset | None:
    """The robot whose state and actions have these sizes."""
    dims = (sizes.proprio_dim, sizes.action_dim)
    return next(
        (
            preset
            for preset in PRESETS.values()
            if (len(preset.state_names), preset.layout.dim) == dims
        ),
        None,
    )


def _normalised_twice(before: ProcessorStatistics, features: Mapping[str, Any]) -> bool:
    """Whether the preprocessor scales pixels to [-1, 1], which the model does too; any other scaling is refused."""
    if before.mode("VISUAL") == "identity":
        return False
    for camera in (name for name in features if name.startswith(CAMERA)):
        found = before.normalization("VISUAL", camera)
        halves = found.mode == "z_score" and all(
            np.allclose(values, 0.5) for values in found.statistics.values()
        )
        if not halves:
            raise CheckpointError(
                f"{before.path} normalises the pictures of {camera!r} by {found.mode}, {found.statistics}: "
                f"the model was trained on [-1, 1]; set VISUAL to IDENTITY if it was trained so"
            )
    return True


def _state_names(sizes: FastWAMConfig) -> tuple[str, ...]:
    preset = _preset(sizes)
    if preset is not None:
        return preset.state_names
    return tuple(f"state_{i}" for i in range(sizes.proprio_dim or 0))


def _layout(
    config: Mapping[str, Any], sizes: FastWAMConfig, after: ProcessorStatistics
) -> ActionLayout:
    """What the actions mean: LIBERO's or RoboTwin's where the sizes are theirs, else by the names the file gives.

    LeRobot toggles a gripper where the saved postprocessor has that step, whatever the config says.
    """
    wanted = (
        after.steps.get(TOGGLE, {}).get("toggle_dimensions", config.get("toggle_action_dimensions"))
        or []
    )
    toggled = [index % sizes.action_dim for index in wanted]
    if len(toggled) > 1:
        raise ConfigError(
            f"`toggle_action_dimensions` names several grippers, {toggled}; this package maps one"
        )
    if (preset := _preset(sizes)) is not None:
        names, control, gripper = preset.layout.names, preset.layout.control, preset.layout.gripper
        if gripper is not None and not toggled:  # trained on LIBERO's own convention
            seen = after.normalization("ACTION", ACTION).statistics
            if "min" in seen and seen["min"][gripper.index] > -0.5:
                raise CheckpointError(
                    f"{after.path}: the gripper's numbers begin at {seen['min'][gripper.index]:g}, so 0 is closed, but nothing "
                    f"toggles them: `toggle_action_dimensions` of config.json should be [{gripper.index}]"
                )
            gripper = Gripper(index=gripper.index, open=-1.0, closed=1.0)
        return ActionLayout(names=names, control=control, gripper=gripper)
    given = config.get("action_feature_names") or [f"action_{i}" for i in range(sizes.action_dim)]
    gripper = Gripper(index=toggled[0], open=1.0, closed=0.0, binary=True) if toggled else None
    return ActionLayout(names=tuple(given), control="unspecified", gripper=gripper)
