"""Training losses of Light-WAM: flow matching of the pooled video, regression of the actions.

The random numbers of a step are an argument, so that a step can be repeated exactly.
See docs/method.md, "Training losses".
"""

# B batch, C latent channels, F latent frames, h w latent grid,
# T actions in a chunk, A numbers per action

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from wam_policy.errors import ConfigError
from wam_policy.models import flow_matching
from wam_policy.models.fast_wam.loss import (
    DEFAULT_SHIFT,
    Batch,
    LossOutput,
    noise_clip,
    squared_error,
    video_loss,
)
from wam_policy.models.layers.video_dit import VideoDiT
from wam_policy.models.light_wam.model import LightWAM, pool_latents


class LightTrainingNoise(NamedTuple):
    """Random numbers of one training step."""

    u_video: Tensor  # [B] uniform, gives the timestep of the video
    noise_video: Tensor  # [B, C, F, h, w] normal, on the pooled grid


@dataclass(frozen=True, kw_only=True, slots=True)
class LightLossConfig:
    """Weights of the two losses, and of the steps of a chunk."""

    video_shift: float = DEFAULT_SHIFT
    lambda_video: float = 1.0
    """Weight of the video loss. 0 disables video co-training and the second pass it needs."""
    lambda_action: float = 1.0
    """Weight of the action loss. The action pass runs even at 0."""
    prefix_steps: int | None = None
    """Number of first steps of a chunk that have weight 1. None: all."""
    tail_weight: float = 0.0
    """Weight of the other steps."""

    def __post_init__(self) -> None:
        if self.prefix_steps is not None and self.prefix_steps < 1:
            raise ConfigError(f"`prefix_steps` must be positive, got {self.prefix_steps}")
        if not 0 <= self.tail_weight <= 1:
            raise ConfigError(f"`tail_weight` must lie in [0, 1], got {self.tail_weight}")

    @property
    def supervised_steps(self) -> int | None:
        """Number of first steps of a chunk that are trained; None: all."""
        if self.tail_weight != 0:
            return None
        return self.prefix_steps

    def step_weights(self, horizon: int, like: Tensor) -> Tensor:
        """Return the weights [T] of the steps of a chunk, on the device of a tensor."""
        prefix_steps = horizon if self.prefix_steps is None else self.prefix_steps
        in_prefix = torch.arange(horizon, device=like.device) < prefix_steps
        # Scalars would take PyTorch's default dtype.
        weights = torch.ones(horizon, dtype=torch.float32, device=like.device)
        return weights.masked_fill(~in_prefix, self.tail_weight)


def sample_light_noise(
    batch: Batch,
    factor: int,
    generator: torch.Generator | None = None,
) -> LightTrainingNoise:
    """Draw the random numbers of one training step, in the order of the reference.

    Args:
        batch: Batch of the step.
        factor: The model's `video_pool`.
        generator: Source of the random numbers; None: PyTorch's global one.
    """
    latents = batch.latents
    size, channels, frames, height, width = latents.shape
    pooled_shape = (size, channels, frames, height // factor, width // factor)

    u_video = torch.rand(size, generator=generator, device=latents.device, dtype=torch.float32)
    noise_video = torch.randn(
        pooled_shape,
        generator=generator,
        device=latents.device,
        dtype=latents.dtype,
    )
    return LightTrainingNoise(u_video, noise_video)


def light_wam_losses(
    model: LightWAM,
    batch: Batch,
    noise: LightTrainingNoise,
    config: LightLossConfig,
) -> LossOutput:
    """Compute the losses of one batch.

    Args:
        model: Model that is trained; it must not be lean.
        batch: Batch of the step.
        noise: Random numbers of the step, from `sample_light_noise`.
        config: Weights and schedules of the losses.
    """
    assert isinstance(model.video, VideoDiT), "a lean model can only act"

    # Both passes use the same embedded text.
    context = model.context(batch.context, batch.proprio)
    text = model.video.shared_text(context, batch.text_bias)

    # Actions, from the first frame at full resolution
    horizon = batch.action.shape[1]
    first_frame = batch.latents[:, :, :1]
    taps = model.tap_features(first_frame, text)
    actions = model.expert(taps, horizon)
    step_weight = ~batch.action_is_pad * config.step_weights(horizon, actions)
    error = squared_error(actions, batch.action).mean(2)
    weight_sum = step_weight.sum(1).clamp(min=1e-6)
    sample_loss = (error * step_weight).sum(1) / weight_sum
    action = sample_loss.mean()

    # Video, pooled before it is noised
    velocity = None
    video = action.new_zeros(())
    if config.lambda_video != 0:
        clean = pool_latents(batch.latents, model.config.video_pool)
        time_dtype = model.precision.time or clean.dtype
        t = flow_matching.timesteps(noise.u_video, config.video_shift, time_dtype)
        noisy = noise_clip(clean, noise.noise_video, t)
        velocity = model.velocity(noisy, t, text)
        video = video_loss(
            velocity,
            clean,
            noise.noise_video,
            batch.latent_is_pad,
            t,
            config.video_shift,
        )

    total = config.lambda_video * video + config.lambda_action * action
    return LossOutput(total, video, action, velocity, actions)
