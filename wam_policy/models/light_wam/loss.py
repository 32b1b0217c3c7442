"""What Light-WAM learns: the pooled future by flow matching, the chunk by regression, given the random numbers of the step.

Source: spec/lightwam.md section 3.3.
"""

# B batch, C latent channels, F latent frames, h w latent grid, T actions in a chunk, A numbers per action

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from wam_policy.errors import ConfigError
from wam_policy.models import flow_matching
from wam_policy.models.fast_wam.loss import (
    Batch,
    LossOutput,
    noise_clip,
    squared_error,
    weighted_mean,
)
from wam_policy.models.layers.video_dit import VideoDiT
from wam_policy.models.light_wam.model import LightWAM, pool_latents


class LightTrainingNoise(NamedTuple):
    """The random numbers of one training step."""

    u_video: Tensor  # [B] uniform
    noise_video: Tensor  # like the pooled latents


@dataclass(frozen=True, kw_only=True, slots=True)
class LightLossConfig:
    """What the two losses weigh, and which steps of the chunk are supervised."""

    video_shift: float = 5.0
    lambda_video: float = 1.0
    """0: no video co-training; the second pass is then not run."""
    lambda_action: float = 1.0
    prefix_steps: int | None = None
    """So many first steps count whole; None: all."""
    tail_weight: float = 0.0
    """What the later steps count."""

    def __post_init__(self) -> None:
        if (
            self.prefix_steps is not None and self.prefix_steps < 1
        ) or not 0 <= self.tail_weight <= 1:
            raise ConfigError(
                f"`prefix_steps` must be positive and `tail_weight` in [0, 1], got {self}"
            )

    @property
    def supervised_steps(self) -> int | None:
        """So many first steps of a chunk are trained at all; None: all."""
        return self.prefix_steps if self.tail_weight == 0 else None

    def step_weights(self, horizon: int, like: Tensor) -> Tensor:
        """Weights [T] of the steps of a chunk."""
        steps = torch.arange(horizon, device=like.device)
        prefix = steps < (horizon if self.prefix_steps is None else self.prefix_steps)
        return torch.where(prefix, 1.0, self.tail_weight)


def sample_light_noise(
    batch: Batch, factor: int, generator: torch.Generator | None = None
) -> LightTrainingNoise:
    """Draw the random numbers of one training step, in the reference's order; `factor` is the model's `video_pool`."""
    device, (b, c, f, h, w) = batch.latents.device, batch.latents.shape
    shape = (b, c, f, h // factor, w // factor)
    u = torch.rand(b, generator=generator, device=device)
    return LightTrainingNoise(
        u, torch.randn(shape, generator=generator, device=device, dtype=batch.latents.dtype)
    )


def light_wam_losses(
    model: LightWAM, batch: Batch, noise: LightTrainingNoise, config: LightLossConfig
) -> LossOutput:
    """Losses of one batch; both passes share the embedded text."""
    assert isinstance(model.video, VideoDiT), "a lean model only acts"
    text = model.video.shared_text(model.context(batch.context, batch.proprio), batch.text_bias)
    horizon = batch.action.shape[1]
    actions = model.expert(model.tap_features(batch.latents[:, :, :1], text), horizon)
    counts = ~batch.action_is_pad * config.step_weights(horizon, actions)
    per_sample = (squared_error(actions, batch.action).mean(2) * counts).sum(1) / counts.sum(
        1
    ).clamp(min=1e-6)
    action, velocity = per_sample.mean(), None
    video = action.new_zeros(())
    if config.lambda_video != 0:
        clean = pool_latents(batch.latents, model.config.video_pool)
        t = flow_matching.timesteps(
            noise.u_video, config.video_shift, model.precision.time or clean.dtype
        )
        velocity = model.velocity(noise_clip(clean, noise.noise_video, t), t, text)
        target = flow_matching.velocity(clean, noise.noise_video)
        error = squared_error(velocity[:, :, 1:], target[:, :, 1:]).mean((1, 3, 4))
        video = weighted_mean(
            error, ~batch.latent_is_pad, flow_matching.loss_weight(t, config.video_shift)
        )
    total = config.lambda_video * video + config.lambda_action * action
    return LossOutput(total, video, action, velocity, actions)
