"""What tells the families apart in training: the sizes of the model, its contract, and the losses of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_map

from wam_policy import normalize
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
from wam_policy.errors import DatasetError
from wam_policy.models.build import Model, build
from wam_policy.models.config import TRUNK, FastWAMConfig, LightWAMConfig
from wam_policy.models.fast_wam import FastWAM
from wam_policy.models.layers import PRECISIONS
from wam_policy.models.light_objective import LightLosses, light_draw, light_losses
from wam_policy.models.light_wam import LightWAM, trained
from wam_policy.models.objective import SHIFT, Batch, Losses, draw, training_losses
from wam_policy.models.vae import VAE
from wam_policy.training.config import DataConfig, LightTrainConfig, TrainConfig
from wam_policy.training.lerobot_reader import LeRobotDataset
from wam_policy.training.start import Start, fill

AnyTrainConfig = TrainConfig | LightTrainConfig


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
    """The config with the shift of the actions' schedule: what it says, else what the weights were trained with, else 5."""
    if not isinstance(config, TrainConfig) or config.loss.action_shift is not None:
        return config
    shift = None if start is None else start.action_shift
    return replace(config, loss=replace(config.loss, action_shift=SHIFT if shift is None else shift))


def cameras(config: DataConfig, dataset: LeRobotDataset) -> CameraConfig:
    """The cameras of the policy a run makes: as large as they were recorded, side by side.

    Raises:
        DatasetError: the dataset lacks one, or they differ in size.
    """
    sizes = {name: dataset.picture_size(f"observation.images.{name}") for name in config.cameras}
    if len(set(sizes.values())) != 1:
        raise DatasetError(f"{dataset.folder}: cameras of different sizes don't stand side by side: {sizes}")
    height, width = sizes[config.cameras[0]]
    return CameraConfig(names=config.cameras, height=height, width=width)


def contract(config: AnyTrainConfig, dataset: LeRobotDataset, vae: VAE, start: Start | None) -> PolicyConfig:
    """The contract of the policy a run makes."""
    layout, state = dataset.action_layout(), dataset.vector("observation.state")
    family: Family = "light_wam"
    variant, action_shift, supervised_steps = None, None, None
    if isinstance(config, TrainConfig):
        family, variant, action_shift = "fast_wam", config.variant, config.loss.action_shift
    else:
        supervised_steps = config.loss.supervised_steps
    return PolicyConfig(
        family=family,
        variant=variant,
        model=model_sizes(config, start, action_dim=layout.dim, proprio_dim=state.shape[1], channels=vae.mean.numel()),
        cameras=cameras(config, dataset),
        video=VideoConfig(frames=config.frames, stride=config.stride),
        state=StateConfig(
            names=dataset.names["observation.state"],
            normalization=normalize.Normalization(mode="min_max", statistics=normalize.statistics(state)),
        ),
        action=ActionConfig(
            layout=layout,
            normalization=normalize.Normalization(mode="min_max", statistics=normalize.statistics(dataset.vector("action"))),
            horizon=(config.frames - 1) * config.stride,
            replan=config.replan,
            supervised_steps=supervised_steps,
        ),
        prompt=PromptConfig(template=config.template, token_length=config.token_length),
        sampling=SamplingConfig(steps=config.sampling_steps, video_shift=config.loss.video_shift, action_shift=action_shift),
        vae=Source(subfolder="vae"),
        text=None,
    )


def new_model(policy: PolicyConfig, start: Start | None) -> Model:
    """The model a run begins with; of a Light-WAM the trunk is frozen."""
    model = build(policy.model, PRECISIONS[policy.precision])
    if start is not None:
        fill(model, start)
    if isinstance(model, LightWAM):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained(name))
    return model


def losses(config: AnyTrainConfig, model: Model, batch: Batch, generators: Sequence[torch.Generator]) -> Losses | LightLosses:
    """The losses of one batch, with new random numbers: each sample's from a generator of its own, on the CPU."""
    device = batch.latents.device
    samples = [tree_map(lambda x, i=i: None if x is None else x[i : i + 1].cpu(), batch) for i in range(len(batch.latents))]
    pairs = zip(samples, generators, strict=True)
    if isinstance(config, TrainConfig):
        assert isinstance(model, FastWAM)
        draws = _joined([draw(sample, generator, config.variant) for sample, generator in pairs], device)
        return training_losses(model, batch, draws, config.loss, config.variant)
    assert isinstance(model, LightWAM)
    light = _joined([light_draw(sample, model.config.video_pool, generator) for sample, generator in pairs], device)
    return light_losses(model, batch, light, config.loss)


D = TypeVar("D")


def _joined(draws: Sequence[D], device: torch.device) -> D:
    """The random numbers of samples as those of a batch."""
    joined: D = tree_map(lambda *x: None if x[0] is None else torch.cat(x).to(device, non_blocking=True), *draws)
    return joined
