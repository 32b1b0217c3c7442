"""Builds the model that sizes are of."""

from __future__ import annotations

import torch

from wam_policy.errors import ConfigError
from wam_policy.models.config import FastWAMConfig, LightWAMConfig
from wam_policy.models.fast_wam.loss import (
    Batch,
    LossConfig,
    LossOutput,
    TrainingNoise,
    fast_wam_losses,
    sample_fast_noise,
)
from wam_policy.models.fast_wam.model import FastWAM
from wam_policy.models.fast_wam.variants import VariantName
from wam_policy.models.layers.precision import FAST, Precision
from wam_policy.models.light_wam.loss import (
    LightLossConfig,
    LightTrainingNoise,
    light_wam_losses,
    sample_light_noise,
)
from wam_policy.models.light_wam.model import LightWAM

Model = FastWAM | LightWAM


def build_model(config: FastWAMConfig | LightWAMConfig, precision: Precision = FAST) -> Model:
    """A new model of these sizes; under `torch.device("meta")` without memory of its own."""
    if isinstance(config, FastWAMConfig):
        return FastWAM(config, precision)
    return LightWAM(config, precision)


AnyTrainingNoise = TrainingNoise | LightTrainingNoise
AnyLossConfig = LossConfig | LightLossConfig


def sample_noise(
    model: Model, batch: Batch, generator: torch.Generator | None, variant: VariantName | None
) -> AnyTrainingNoise:
    """The random numbers of a batch; a Fast-WAM's depend on its variant, which a Light-WAM hasn't."""
    if isinstance(model, FastWAM):
        return sample_fast_noise(batch, generator, variant or "fast")
    return sample_light_noise(batch, model.config.video_pool, generator)


def compute_losses(
    model: Model,
    batch: Batch,
    noise: AnyTrainingNoise,
    config: AnyLossConfig,
    variant: VariantName | None,
) -> LossOutput:
    """The losses of a batch, given its random numbers.

    Raises:
        ConfigError: the losses or the random numbers are the other family's.
    """
    if isinstance(model, FastWAM):
        if not isinstance(config, LossConfig) or not isinstance(noise, TrainingNoise):
            raise ConfigError("a Fast-WAM's loss is a `LossConfig`, its random numbers are `Draws`")
        fast = fast_wam_losses(model, batch, noise, config, variant or "fast")
        return LossOutput(fast.total, fast.video, fast.action)
    if not isinstance(config, LightLossConfig) or not isinstance(noise, LightTrainingNoise):
        raise ConfigError(
            "a Light-WAM's loss is a `LightLossConfig`, its random numbers are `LightDraws`"
        )
    light = light_wam_losses(model, batch, noise, config)
    return LossOutput(light.total, light.video, light.action)
