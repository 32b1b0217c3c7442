"""Resolves the options that a run leaves unset: from its preset, its pretrained policy or defaults.

`camera_config` expects a config whose options `inherit_from_policy` has filled in.
"""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

from wam_policy import presets
from wam_policy.config import CameraConfig, PolicyConfig, PromptConfig
from wam_policy.contract import ActionLayout
from wam_policy.data.config import CacheConfig, DataConfig, resolved
from wam_policy.data.mixture import Mixture
from wam_policy.errors import ConfigError, DatasetError
from wam_policy.models.fast_wam.loss import DEFAULT_SHIFT
from wam_policy.models.light_wam.loss import LightLossConfig
from wam_policy.presets import Preset
from wam_policy.training.config import AnyTrainConfig, DataT, LightTrainConfig, TrainConfig
from wam_policy.training.initialization import InitWeights

# Values of options that neither the config, its preset nor its pretrained policy sets.
DEFAULTS = {
    "cameras": ("front", "wrist"),
    "frames": 5,
    "frame_stride": 4,
    "replan": 8,
    "num_inference_steps": 10,
}

# Tokens per prompt for the small text encoder with random weights.
UNTRAINED_TOKEN_LENGTH = 8


def run_preset(config: DataConfig) -> Preset | None:
    """Return the papers' settings for the dataset that `config.preset` names; None if it is unset.

    Raises:
        ConfigError: The model family has no such preset.
    """
    if config.preset is None:
        return None
    if isinstance(config, CacheConfig):
        return presets.preset_of(config.family, config.preset)
    if isinstance(config, LightTrainConfig):
        return presets.preset_of("light_wam", config.preset)
    return presets.preset_of("fast_wam", config.preset)


def _preset_options(config: DataConfig, preset: Preset) -> dict[str, Any]:
    """Return the options of a config that its preset sets, by name."""
    options: dict[str, Any] = {
        "cameras": preset.cameras.names,
        "frames": preset.video.frames,
        "frame_stride": preset.video.stride,
        "state_normalization": preset.normalization,
        "action_normalization": preset.normalization,
        "replan": preset.replan,
        "prompt_template": preset.prompt.template,
        "token_length": preset.prompt.token_length,
        "num_inference_steps": preset.sampling.steps,
    }
    # The papers supervise only the first steps of a Light-WAM's chunk.
    if isinstance(config, LightTrainConfig):
        options["loss"] = LightLossConfig(prefix_steps=preset.supervised_steps)
    names = {field.name for field in dataclasses.fields(config)}
    return {name: value for name, value in options.items() if name in names}


def apply_preset(config: DataT) -> DataT:
    """Return the config with the options of its preset filled in.

    Raises:
        ConfigError: The config sets one of these options to another value.
    """
    preset = run_preset(config)
    if preset is None:
        return config
    options = _preset_options(config, preset)

    # An option that still has its default counts as unset.
    defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(config)}
    defaults["loss"] = LightLossConfig()
    conflicts = []
    for name, value in options.items():
        if getattr(config, name) not in (defaults[name], value):
            conflicts.append(f"`{name}`")

    if conflicts:
        raise ConfigError(
            f"the preset {config.preset!r} sets {', '.join(conflicts)}: leave these options out"
        )
    return replace(config, **options)


def inherit_from_policy(config: DataT, policy: PolicyConfig | None) -> DataT:
    """Return the config with its unset options filled in.

    Values come from its preset, else from the pretrained policy, else from `DEFAULTS`.

    Args:
        config: Options of a run or of an encoding.
        policy: Contract of the policy that the run starts from; None for raw or new weights.

    Raises:
        ConfigError: The config sets an option that its preset sets to another value.
    """
    config = apply_preset(config)
    values: dict[str, Any] = dict(DEFAULTS)
    if policy is not None:
        values = {
            "cameras": policy.cameras.names,
            "frames": policy.video.frames,
            "frame_stride": policy.video.stride,
            "replan": policy.action.replan,
            "num_inference_steps": policy.sampling.steps,
        }

    # A `CacheConfig` has only some of these options.
    names = {field.name for field in dataclasses.fields(config)}
    unset = [name for name in DEFAULTS if name in names and getattr(config, name) is None]
    return replace(config, **{name: values[name] for name in unset})


def resolve_defaults(config: AnyTrainConfig, start: InitWeights | None) -> AnyTrainConfig:
    """Return the config of a run with every unset option filled in.

    Args:
        config: Options of the run.
        start: Weights that it starts from; None: new ones.

    Raises:
        ConfigError: The config sets an option that its preset sets to another value.
    """
    policy = None if start is None else start.policy
    config = _resolve_prompt(inherit_from_policy(config, policy), start)

    # Only a Fast-WAM samples its actions, so only its loss has a schedule for them.
    if not isinstance(config, TrainConfig) or config.loss.action_shift is not None:
        return config
    shift = DEFAULT_SHIFT
    if start is not None and start.action_shift is not None:
        shift = start.action_shift
    return replace(config, loss=replace(config.loss, action_shift=shift))


def _resolve_prompt(config: AnyTrainConfig, start: InitWeights | None) -> AnyTrainConfig:
    """Fill in the prompt's template and length: the pretrained weights', else the papers'."""
    # Raw Wan weights define no prompt format; training from them uses the papers' one.
    if start is None:
        length = UNTRAINED_TOKEN_LENGTH
        if config.text_encoder is not None:
            length = presets.PROMPT.token_length
        prompt = PromptConfig(template="{task}", token_length=length)
    else:
        prompt = start.prompt or presets.PROMPT

    # The options have precedence.
    if config.prompt_template is None:
        config = replace(config, prompt_template=prompt.template)
    if config.token_length is None:
        config = replace(config, token_length=prompt.token_length)
    return config


def action_layout(config: DataConfig, dataset: Mixture) -> ActionLayout:
    """Return the layout of the action vector, from the preset or else from the dataset.

    Raises:
        DatasetError: Neither defines one, or the dataset's actions have another length.
    """
    preset = run_preset(config)
    layout = dataset.action_layout() if preset is None else preset.layout
    length = len(dataset.action_names)
    if length != layout.dim:
        # Only the user can tell which of the two is wrong.
        remedy = "correct meta/wam_contract.json"
        if preset is not None:
            remedy = "use another dataset, or another preset"
        raise DatasetError(
            f"{dataset.folder}: expected actions of {layout.dim} numbers "
            f"({', '.join(layout.names)}), got {length}; {remedy}"
        )
    return layout


def state_names(config: DataConfig, dataset: Mixture) -> tuple[str, ...]:
    """Return the names of the numbers of the state, from the preset or else from the dataset.

    Raises:
        DatasetError: The dataset has no state, or one of another length than the preset's.
    """
    preset = run_preset(config)
    recorded = dataset.state_names
    names = recorded if preset is None else preset.state_names
    if len(names) != len(recorded):
        raise DatasetError(
            f"{dataset.folder}: expected a state of {len(names)} numbers, got {len(recorded)} in "
            f"{', '.join(dataset.state_key)}; use another dataset, or another preset"
        )
    return names


def camera_config(
    config: DataConfig, dataset: Mixture, policy: PolicyConfig | None = None
) -> CameraConfig:
    """Return the cameras of a new policy and their arrangement on the canvas.

    It is that of the preset, else that of the pretrained policy if it has the same cameras, else
    all cameras side by side in the size they were recorded in.

    Args:
        config: Resolved options.
        dataset: Dataset that has these cameras.
        policy: Contract of the policy that the run starts from; None for raw or new weights.

    Raises:
        DatasetError: The dataset lacks a camera, or the cameras differ in size and nothing defines
            their arrangement.
    """
    # Also checks that the dataset has the cameras.
    preset = run_preset(config)
    names = resolved(config.cameras)
    sizes = {name: dataset.frame_size(name) for name in names}  # (height, width)
    if preset is not None:
        return preset.cameras
    if policy is not None and policy.cameras.names == names:
        return policy.cameras

    if len(set(sizes.values())) != 1:
        raise DatasetError(
            f"{dataset.folder}: cameras of different sizes cannot be placed side by side: {sizes}; "
            f"record them in one size, or set --preset or --pretrained-path"
        )
    height, width = sizes[names[0]]
    return CameraConfig(names=names, height=height, width=width)
