"""What tells the families apart in training: the sizes of the model, its contract, and what of it is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from wam_policy import presets
from wam_policy.config import (
    ActionConfig,
    CameraConfig,
    Family,
    PolicyConfig,
    PromptConfig,
    SamplingConfig,
    Source,
    StateConfig,
    VideoConfig,
)
from wam_policy.contract import ActionLayout
from wam_policy.errors import ConfigError, DatasetError
from wam_policy.hub import statistics as given
from wam_policy.models.build import Model, build
from wam_policy.models.config import TRUNK, FastWAMConfig, LightWAMConfig
from wam_policy.models.fast_wam import FastWAM
from wam_policy.models.layers import PRECISIONS
from wam_policy.models.light_objective import LightLossConfig
from wam_policy.models.light_wam import trained
from wam_policy.models.objective import SHIFT
from wam_policy.models.vae import VAE
from wam_policy.normalize import Normalization, statistics
from wam_policy.presets import Preset
from wam_policy.training.config import CacheConfig, DataConfig, LightTrainConfig, TrainConfig
from wam_policy.training.mixture import Mixture
from wam_policy.training.start import EMBODIMENT, Start, fill

AnyTrainConfig = TrainConfig | LightTrainConfig
DataT = TypeVar("DataT", bound=DataConfig)


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


STATISTICS = "dataset_stats.json"  # in the folder of a run
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


def model_sizes(
    config: AnyTrainConfig, start: Start | None, *, action_dim: int, proprio_dim: int, channels: int
) -> FastWAMConfig | LightWAMConfig:
    """The sizes of the model a run makes: the robot's and the codec's, then those it begins from, then the config's."""
    robot: dict[str, Any] = {"action_dim": action_dim, "proprio_dim": proprio_dim, "latent_channels": channels}
    given = {} if start is None else start.sizes
    sizes = asdict(config.sizes)
    if isinstance(config, TrainConfig):
        return FastWAMConfig(**{**sizes, **{name: given[name] for name in sizes if name in given}, **robot})
    if "taps" in given:
        return LightWAMConfig(**{**given, **robot})
    features = (("adapted",),) * len(config.sizes.taps)
    return LightWAMConfig(**{**sizes, "features": features, **{name: given[name] for name in TRUNK if name in given}, **robot})


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


def contract(config: AnyTrainConfig, dataset: Mixture, vae: VAE, start: Start | None) -> PolicyConfig:
    """The contract of the policy a run makes, from a settled config."""
    assert config.template is not None and config.token_length is not None
    text = None if start is None or start.text is None or start.text.repo is None else start.text
    actions, names, preset = layout(config, dataset), state_names(config, dataset), preset_of(config)
    of_state, of_action = scaling(config, dataset, start)
    family: Family = "light_wam"
    variant, action_shift, supervised_steps = None, None, None
    if isinstance(config, TrainConfig):
        family, variant, action_shift = "fast_wam", config.variant, config.loss.action_shift
    else:
        supervised_steps = config.loss.supervised_steps
    return PolicyConfig(
        family=family,
        variant=variant,
        model=model_sizes(config, start, action_dim=actions.dim, proprio_dim=len(names), channels=vae.mean.numel()),
        cameras=cameras(config, dataset, None if start is None else start.policy),
        video=VideoConfig(frames=config.frames, stride=config.stride),
        state=StateConfig(names=names, normalization=of_state),
        action=ActionConfig(
            layout=actions,
            normalization=of_action,
            snap=None if preset is None else preset.snap,
            horizon=(config.frames - 1) * config.stride,
            replan=config.replan,
            supervised_steps=supervised_steps,
        ),
        prompt=PromptConfig(template=config.template, token_length=config.token_length),
        sampling=SamplingConfig(steps=config.sampling_steps, video_shift=config.loss.video_shift, action_shift=action_shift),
        vae=Source(subfolder="vae"),
        text=text,
    )


def differences(policy: PolicyConfig, start: Start | None) -> list[str]:
    """What of a policy's contract is otherwise than in the policy it begins from, and would be learned anew."""
    theirs = None if start is None else start.policy
    if theirs is None:
        return []
    pairs = {
        "cameras": (theirs.cameras, policy.cameras),
        "video": (theirs.video, policy.video),
        "actions": (theirs.action.layout, policy.action.layout),
        "horizon": (theirs.action.horizon, policy.action.horizon),
        "prompt": (theirs.prompt, policy.prompt),
    }
    return [f"{name} {new}, not {old}" for name, (old, new) in pairs.items() if old != new]


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


PARTS = {  # of a Fast-WAM that can be trained alone: the beginnings of their names
    "all": ("",),
    "video": ("video.", "proprio_encoder."),
    "action": ("action.", "proprio_encoder."),
    "embodiment": EMBODIMENT,
    "lora": EMBODIMENT,  # and adapters
}


def new_model(policy: PolicyConfig, start: Start | None, part: str = "all") -> Model:
    """The model a run begins with; what isn't trained is frozen: of a Fast-WAM all but a part, of a Light-WAM the trunk."""
    model = build(policy.model, PRECISIONS[policy.precision])
    if start is not None:
        fill(model, start)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(PARTS[part]) if isinstance(model, FastWAM) else trained(name))
    return model
