"""Resolves the options a run leaves unset: from its preset, from the policy it starts from, or the defaults."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

from wam_policy import presets
from wam_policy.config import (
    CameraConfig,
    PolicyConfig,
    PromptConfig,
)
from wam_policy.contract import ActionLayout
from wam_policy.data.config import CacheConfig, DataConfig
from wam_policy.data.mixture import Mixture
from wam_policy.errors import ConfigError, DatasetError
from wam_policy.models.fast_wam.loss import DEFAULT_SHIFT
from wam_policy.models.light_wam.loss import LightLossConfig
from wam_policy.presets import Preset
from wam_policy.training.config import AnyTrainConfig, DataT, LightTrainConfig, TrainConfig
from wam_policy.training.initialization import InitWeights


def run_preset(config: DataConfig) -> Preset | None:
    """What the papers say of the data.

    Raises:
        ConfigError: the family has no such preset.
    """
    if config.preset is None:
        return None
    given = config.family if isinstance(config, CacheConfig) else "fast_wam"
    return presets.preset_of(
        "light_wam" if isinstance(config, LightTrainConfig) else given, config.preset
    )


def apply_preset(config: DataT) -> DataT:
    """The config with what its preset says.

    Raises:
        ConfigError: the config says something of it too.
    """
    preset = run_preset(config)
    if preset is None:
        return config
    said: dict[str, Any] = {
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
    if isinstance(config, LightTrainConfig):
        said["loss"] = LightLossConfig(prefix_steps=preset.supervised_steps)
    fields = {field.name: field.default for field in dataclasses.fields(config)} | {
        "loss": LightLossConfig()
    }
    said = {name: value for name, value in said.items() if name in fields}
    twice = [
        name for name, value in said.items() if getattr(config, name) not in (fields[name], value)
    ]
    if twice:
        raise ConfigError(
            f"the preset {config.preset!r} says {', '.join(f'`{name}`' for name in twice)}: leave that out"
        )
    return replace(config, **said)


DEFAULTS = {
    "cameras": ("front", "wrist"),
    "frames": 5,
    "frame_stride": 4,
    "replan": 8,
    "num_inference_steps": 10,
}


def inherit_from_policy(config: DataT, policy: PolicyConfig | None) -> DataT:
    """The config with what it doesn't say: as its preset has it, else the policy a run begins from, else as is usual.

    Raises:
        ConfigError: the config says something that its preset says too.
    """
    config, theirs = apply_preset(config), dict[str, Any]()
    if policy is not None:
        theirs = {
            "cameras": policy.cameras.names,
            "frames": policy.video.frames,
            "frame_stride": policy.video.stride,
        }
        theirs |= {"replan": policy.action.replan, "num_inference_steps": policy.sampling.steps}
    unsaid = [name for name in DEFAULTS if not getattr(config, name, True)]
    return replace(config, **{name: theirs.get(name, DEFAULTS[name]) for name in unsaid})


def action_layout(config: DataConfig, dataset: Mixture) -> ActionLayout:
    """What the actions mean: as the preset says, else the dataset.

    Raises:
        DatasetError: nobody says, or it is another number of them.
    """
    preset = run_preset(config)
    found = dataset.action_layout() if preset is None else preset.layout
    there = len(dataset.names.get("action", ()))
    if there != found.dim:
        raise DatasetError(
            f"{dataset.folder}: its actions have {there} numbers, but {found.dim} names: {', '.join(found.names)}; "
            f"{'another dataset, or another preset' if preset else 'mend meta/wam_contract.json'}"
        )
    return found


def state_names(config: DataConfig, dataset: Mixture) -> tuple[str, ...]:
    """What the numbers of the state are called: as the preset says, else the dataset.

    Raises:
        DatasetError: there is no state, or it is another number of them.
    """
    preset, theirs = run_preset(config), dataset.names.get("observation.state", ())
    found = theirs if preset is None else preset.state_names
    if not theirs or len(found) != len(theirs):
        wanted = len(found) or "some"
        raise DatasetError(
            f"{dataset.folder}: `observation.state` should have {wanted} numbers, it has {len(theirs)}"
        )
    return tuple(found)


def resolve_defaults(config: AnyTrainConfig, start: InitWeights | None) -> AnyTrainConfig:
    """The config with what it leaves to a preset or to what a run begins from: contract, prompts' form, the actions' shift."""
    config = inherit_from_policy(config, None if start is None else start.policy)
    usual = PromptConfig(
        template="{task}",
        token_length=8 if config.text_encoder is None else presets.PROMPT.token_length,
    )
    if start is not None:
        usual = presets.PROMPT if start.prompt is None else start.prompt
    template = usual.template if config.prompt_template is None else config.prompt_template
    length = usual.token_length if config.token_length is None else config.token_length
    config = replace(config, prompt_template=template, token_length=length)
    if not isinstance(config, TrainConfig) or config.loss.action_shift is not None:
        return config
    shift = None if start is None else start.action_shift
    return replace(
        config, loss=replace(config.loss, action_shift=DEFAULT_SHIFT if shift is None else shift)
    )


def camera_config(
    config: DataConfig, dataset: Mixture, policy: PolicyConfig | None = None
) -> CameraConfig:
    """The cameras of the policy a run makes.

    As the preset puts them together, else the policy it begins from where it has the same ones, else as large as they were
    recorded, side by side.

    Raises:
        DatasetError: the dataset lacks one, or they differ in size and nothing says how they are put together.
    """
    preset = run_preset(config)
    sizes = {name: dataset.picture_size(name) for name in config.cameras}
    if preset is not None:
        return preset.cameras
    if policy is not None and policy.cameras.names == config.cameras:
        return policy.cameras
    if len(set(sizes.values())) != 1:
        raise DatasetError(
            f"{dataset.folder}: cameras of different sizes don't stand side by side: {sizes}"
        )
    height, width = sizes[config.cameras[0]]
    return CameraConfig(names=config.cameras, height=height, width=width)
