"""What Fast-WAM learns: the flow-matching losses of one batch, for every variant, given the random numbers of the step.

Source: spec/fastwam.md sections 3.2 and 3.3.
"""

# B batch, C latent channels, F latent frames, h w latent grid, L text tokens, T actions in a chunk, A numbers per action

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from wam_policy.errors import ConfigError
from wam_policy.models import flow_matching
from wam_policy.models.fast_wam.model import FastWAM
from wam_policy.models.fast_wam.variants import VARIANTS, VariantName

DEFAULT_SHIFT = 5.0  # of the schedules, where nothing else is said
NOISED_CONTEXT_CLIPS = 0.5  # part of the samples whose second context_clip of the clip is noised; the reference's constant


class Batch(NamedTuple):
    """One training batch, already normalised and encoded."""

    latents: Tensor  # [B, C, F, h, w], frame 0 is the observation
    context: Tensor  # [B, L, text_dim] prompt embeddings, zero past the prompt's end
    action: Tensor  # [B, T, A]
    proprio: Tensor | None  # [B, P]
    action_is_pad: Tensor  # bool [B, T]
    latent_is_pad: Tensor  # bool [B, F − 1], of the frames after the first
    text_bias: Tensor | None = (
        None  # [B, L], where rows of the context stand for several: see `padding.condensed`
    )


class ContextClipNoise(NamedTuple):
    """The random numbers of the second context_clip of the clip."""

    u_noised: Tensor  # [B] uniform; below NOISED_COPIES the context_clip is noised
    u_context: Tensor  # [B] uniform
    noise_context: Tensor  # like the latents
    u_attend_full_video: (
        Tensor  # [B] uniform; below `action_idm_prob` the actions see the whole context_clip
    )


class TrainingNoise(NamedTuple):
    """The random numbers of one training step."""

    noise_video: Tensor  # like the latents
    u_video: Tensor  # [B] uniform
    noise_action: Tensor  # like the actions
    u_action: Tensor  # [B] uniform
    context_clip: ContextClipNoise | None = None  # of the variants that have a context_clip


class LossOutput(NamedTuple):
    """Losses of one batch and the predictions they come from."""

    total: Tensor
    video: Tensor
    action: Tensor
    video_prediction: Tensor | None = None  # [B, C, F, h, w]; None where the video loss is off
    action_prediction: Tensor | None = None  # [B, T, A]; None where the action loss is off


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """What the two losses weigh and how their timesteps are drawn."""

    video_shift: float = 5.0
    action_shift: float | None = None
    """Of the actions' schedule; the default is that of the weights a run begins from, else 5."""
    lambda_video: float = 1.0
    """0: no video co-training; what only the video's loss needs is then not computed."""
    lambda_action: float = 1.0
    """0: only the video is learned; the action expert is then not run."""
    action_idm_prob: float = 0.5
    """Optional-IDM: part of the samples whose actions see the whole video, not only its first frame."""

    def __post_init__(self) -> None:
        if self.lambda_video == 0 == self.lambda_action:
            raise ConfigError("`lambda_video` and `lambda_action` are both 0: nothing is learned")
        if not 0 <= self.action_idm_prob <= 1:
            raise ConfigError(f"`action_idm_prob` must lie in [0, 1], got {self.action_idm_prob}")


def sample_fast_noise(
    batch: Batch, generator: torch.Generator | None = None, variant: VariantName = "fast"
) -> TrainingNoise:
    """Draw the random numbers of one training step, in the reference's order."""
    device, b = batch.latents.device, len(batch.latents)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype)

    def uniform() -> Tensor:
        return torch.rand(b, generator=generator, device=device)

    draws = TrainingNoise(normal(batch.latents), uniform(), normal(batch.action), uniform())
    if not VARIANTS[variant].uses_context_clip:
        return draws
    return draws._replace(
        context_clip=ContextClipNoise(uniform(), uniform(), normal(batch.latents), uniform())
    )


def fast_wam_losses(
    model: FastWAM,
    batch: Batch,
    noise: TrainingNoise,
    config: LossConfig,
    variant: VariantName = "fast",
) -> LossOutput:
    """Flow-matching losses of one batch.

    With `lambda_video` 0 the passes and frames that only the video's loss reads are left out: same action loss, same gradients.
    With `lambda_action` 0 what only the actions' loss reads is.
    """
    kind, with_video, with_action = (
        VARIANTS[variant],
        config.lambda_video != 0,
        config.lambda_action != 0,
    )
    action_shift = DEFAULT_SHIFT if config.action_shift is None else config.action_shift
    clean = batch.latents if with_video or kind.attends_to == "video" else batch.latents[:, :, :1]
    noise_video = noise.noise_video[:, :, : clean.shape[2]]
    time = model.precision.time or clean.dtype
    t_video = flow_matching.timesteps(noise.u_video, config.video_shift, time)
    t_action = flow_matching.timesteps(noise.u_action, action_shift, time)
    context_clip, attend_full_video = None, None
    if kind.uses_context_clip and with_action:
        if noise.context_clip is None:
            raise ConfigError(
                f"the variant {variant!r} needs draws of its own: `draw(batch, variant={variant!r})`"
            )
        noised = noise.context_clip.u_noised < NOISED_CONTEXT_CLIPS
        t_context = (
            flow_matching.timesteps(noise.context_clip.u_context, config.video_shift, time) * noised
        )
        context_clip = (noise_clip(clean, noise.context_clip.noise_context, t_context), t_context)
        attend_full_video = (
            noise.context_clip.u_attend_full_video < config.action_idm_prob
            if kind.optional_video
            else None
        )
    velocity_video, velocity_action = model(
        noise_clip(clean, noise_video, t_video),
        t_video,
        flow_matching.add_noise(batch.action, noise.noise_action, t_action),
        t_action,
        model.context(batch.context, batch.proprio),
        attend_video=kind.attends_to == "video",
        context_clip=context_clip,
        attend_full_video=attend_full_video,
        text_bias=batch.text_bias,
        decode_video=with_video,
        decode_actions=with_action,
    )
    action, video = (
        t_action.new_zeros((), dtype=torch.float32),
        t_video.new_zeros((), dtype=torch.float32),
    )
    if velocity_action is not None:
        action_error = squared_error(
            velocity_action, flow_matching.velocity(batch.action, noise.noise_action)
        ).mean(2)
        action = weighted_mean(
            action_error, ~batch.action_is_pad, flow_matching.loss_weight(t_action, action_shift)
        )
    if velocity_video is not None:
        target = flow_matching.velocity(clean, noise_video)[:, :, 1:]
        video_error = squared_error(velocity_video[:, :, 1:], target).mean((1, 3, 4))
        video = weighted_mean(
            video_error,
            ~batch.latent_is_pad,
            flow_matching.loss_weight(t_video, config.video_shift),
        )
    total = config.lambda_video * video + config.lambda_action * action
    return LossOutput(total, video, action, velocity_video, velocity_action)


def noise_clip(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """A clip [B, C, F, h, w] noised at timesteps `t` [B], but for its first frame."""
    return torch.cat(
        (clean[:, :, :1], flow_matching.add_noise(clean[:, :, 1:], noise[:, :, 1:], t)), dim=2
    )


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared differences, float32."""
    return (prediction.float() - target.float()).square()


def weighted_mean(error: Tensor, valid: Tensor, weight: Tensor) -> Tensor:
    """Mean of `error` [B, K] over each sample's valid places, weighted per sample [B], averaged over the batch."""
    mean = (error * valid).sum(1) / valid.sum(1).clamp(min=1)
    return (mean * weight).mean()


def latent_padding(image_is_pad: Tensor, temporal_ratio: int = 4) -> Tensor:
    """Padding of pixel frames, bool [B, 1 + ratio·n] -> of latent frames after the first, [B, n]: all of their frames."""
    return image_is_pad[:, 1:].unflatten(1, (-1, temporal_ratio)).all(2)
