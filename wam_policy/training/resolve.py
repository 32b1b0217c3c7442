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
from wam_policy.models.fast_wam.loss import SHIFT
from wam_policy.models.light_wam.loss import LightLossConfig
from wam_policy.presets import Preset
from wam_policy.training.config import AnyTrainConfig, DataT, LightTrainConfig, TrainConfig
from wam_policy.training.initialization import Start


def preset_of(config: DataConfig) -> Preset | None:
    """What the papers say of the data.

    Raises:
        ConfigError: the family has no such preset.
    """
    if config.preset is None:
        return None
    given = config.family if isinstance(config, CacheConfig) else "fast_wam"
    return presets.preset_of("light_wam" if isinstance(config, LightTrainConfig) else given, config.preset)


def with_preset(config: DataT) -> DataT:
    """The config with what its preset says.

    Raises:
        ConfigError: the config says something of it too.
    """
    preset = preset_of(config)
    if preset is None:
        return config
    said: dict[str, Any] = {
        "cameras": preset.cameras.names,
        "frames": preset.video.frames,
        "stride": preset.video.stride,
        "state_scaling": preset.normalization,
        "action_scaling": preset.normalization,
        "replan": preset.replan,
        "template": preset.prompt.template,
        "token_length": preset.prompt.token_length,
        "sampling_steps": preset.sampling.steps,
    }
    if isinstance(config, LightTrainConfig):
        said["loss"] = LightLossConfig(prefix_steps=preset.supervised_steps)
    fields = {field.name: field.default for field in dataclasses.fields(config)} | {"loss": LightLossConfig()}
    said = {name: value for name, value in said.items() if name in fields}
    twice = [name for name, value in said.items() if getattr(config, name) not in (fields[name], value)]
    if twice:
        raise ConfigError(f"the preset {config.preset!r} says {', '.join(f'`{name}`' for name in twice)}: leave that out")
    return replace(config, **said)


USUAL = {"cameras": ("front", "wrist"), "frames": 5, "stride": 4, "replan": 8, "sampling_steps": 10}


def inherited(config: DataT, policy: PolicyConfig | None) -> DataT:
    """The config with what it doesn't say: as its preset has it, else the policy a run begins from, else as is usual.

    Raises:
        ConfigError: the config says something that its preset says too.
    """
    config, theirs = with_preset(config), dict[str, Any]()
    if policy is not None:
        theirs = {"cameras": policy.cameras.names, "frames": policy.video.frames, "stride": policy.video.stride}
        theirs |= {"replan": policy.action.replan, "sampling_steps": policy.sampling.steps}
    unsaid = [name for name in USUAL if not getattr(config, name, True)]
    return replace(config, **{name: theirs.get(name, USUAL[name]) for name in unsaid})


def layout(config: DataConfig, dataset: Mixture) -> ActionLayout:
    """What the actions mean: as the preset says, else the dataset.

    Raises:
        DatasetError: nobody says, or it is another number of them.
    """
    preset = preset_of(config)
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
    preset, theirs = preset_of(config), dataset.names.get("observation.state", ())
    found = theirs if preset is None else preset.state_names
    if not theirs or len(found) != len(theirs):
        wanted = len(found) or "some"
        raise DatasetError(f"{dataset.folder}: `observation.state` should have {wanted} numbers, it has {len(theirs)}")
    return tuple(found)


def settled(config: AnyTrainConfig, start: Start | None) -> AnyTrainConfig:
    """The config with what it leaves to a preset or to what a run begins from: contract, prompts' form, the actions' shift."""
    config = inherited(config, None if start is None else start.policy)
    usual = PromptConfig(template="{task}", token_length=8 if config.text is None else presets.PROMPT.token_length)
    if start is not None:
        usual = presets.PROMPT if start.prompt is None else start.prompt
    template = usual.template if config.template is None else config.template
    length = usual.token_length if config.token_length is None else config.token_length
    config = replace(config, template=template, token_length=length)
    if not isinstance(config, TrainConfig) or config.loss.action_shift is not None:
        return config
    shift = None if start is None else start.action_shift
    return replace(config, loss=replace(config.loss, action_shift=SHIFT if shift is None else shift))


def cameras(config: DataConfig, dataset: Mixture, policy: PolicyConfig | None = None) -> CameraConfig:
    """The cameras of the policy a run makes.

    As the preset puts them together, else the policy it begins from where it has the same ones, else as large as they were
    recorded, side by side.

    Raises:
        DatasetError: the dataset lacks one, or they differ in size and nothing says how they are put together.
    """
    preset = preset_of(config)
    sizes = {name: dataset.picture_size(name) for name in config.cameras}
    if preset is not None:
        return preset.cameras
    if policy is not None and policy.cameras.names == config.cameras:
        return policy.cameras
    if len(set(sizes.values())) != 1:
        raise DatasetError(f"{dataset.folder}: cameras of different sizes don't stand side by side: {sizes}")
    height, width = sizes[config.cameras[0]]
    return CameraConfig(names=config.cameras, height=height, width=width)
