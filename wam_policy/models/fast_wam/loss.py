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

SHIFT = 5.0  # of the schedules, where nothing else is said
NOISED_COPIES = 0.5  # part of the samples whose second copy of the clip is noised; the reference's constant


class Batch(NamedTuple):
    """One training batch, already normalised and encoded."""

    latents: Tensor  # [B, C, F, h, w], frame 0 is the observation
    context: Tensor  # [B, L, text_dim] prompt embeddings, zero past the prompt's end
    action: Tensor  # [B, T, A]
    proprio: Tensor | None  # [B, P]
    action_is_pad: Tensor  # bool [B, T]
    latent_is_pad: Tensor  # bool [B, F − 1], of the frames after the first
    text_bias: Tensor | None = None  # [B, L], where rows of the context stand for several: see `padding.condensed`


class CopyDraws(NamedTuple):
    """The random numbers of the second copy of the clip."""

    u_noised: Tensor  # [B] uniform; below NOISED_COPIES the copy is noised
    u_copy: Tensor  # [B] uniform
    noise_copy: Tensor  # like the latents
    u_see_all: Tensor  # [B] uniform; below `action_idm_prob` the actions see the whole copy


class Draws(NamedTuple):
    """The random numbers of one training step."""

    noise_video: Tensor  # like the latents
    u_video: Tensor  # [B] uniform
    noise_action: Tensor  # like the actions
    u_action: Tensor  # [B] uniform
    copy: CopyDraws | None = None  # of the variants that have a copy


class Losses(NamedTuple):
    """Losses of one batch and the predictions they come from."""

    total: Tensor
    video: Tensor
    action: Tensor
    velocity_video: Tensor | None  # [B, C, F, h, w]; None where the video loss is off
    velocity_action: Tensor | None  # [B, T, A]; None where the action loss is off


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


def draw(batch: Batch, generator: torch.Generator | None = None, variant: VariantName = "fast") -> Draws:
    """Draw the random numbers of one training step, in the reference's order."""
    device, b = batch.latents.device, len(batch.latents)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype)

    def uniform() -> Tensor:
        return torch.rand(b, generator=generator, device=device)

    draws = Draws(normal(batch.latents), uniform(), normal(batch.action), uniform())
    if not VARIANTS[variant].copy:
        return draws
    return draws._replace(copy=CopyDraws(uniform(), uniform(), normal(batch.latents), uniform()))


def training_losses(model: FastWAM, batch: Batch, draws: Draws, config: LossConfig, variant: VariantName = "fast") -> Losses:
    """Flow-matching losses of one batch.

    With `lambda_video` 0 the passes and frames that only the video's loss reads are left out: same action loss, same gradients.
    With `lambda_action` 0 what only the actions' loss reads is.
    """
    kind, with_video, with_action = VARIANTS[variant], config.lambda_video != 0, config.lambda_action != 0
    action_shift = SHIFT if config.action_shift is None else config.action_shift
    clean = batch.latents if with_video or kind.sees == "video" else batch.latents[:, :, :1]
    noise_video = draws.noise_video[:, :, : clean.shape[2]]
    time = model.precision.time or clean.dtype
    t_video = flow_matching.timesteps(draws.u_video, config.video_shift, time)
    t_action = flow_matching.timesteps(draws.u_action, action_shift, time)
    copy, see_all = None, None
    if kind.copy and with_action:
        if draws.copy is None:
            raise ConfigError(f"the variant {variant!r} needs draws of its own: `draw(batch, variant={variant!r})`")
        noised = draws.copy.u_noised < NOISED_COPIES
        t_copy = flow_matching.timesteps(draws.copy.u_copy, config.video_shift, time) * noised
        copy = (noisy(clean, draws.copy.noise_copy, t_copy), t_copy)
        see_all = draws.copy.u_see_all < config.action_idm_prob if kind.optional else None
    velocity_video, velocity_action = model(
        noisy(clean, noise_video, t_video),
        t_video,
        flow_matching.add_noise(batch.action, draws.noise_action, t_action),
        t_action,
        model.context(batch.context, batch.proprio),
        see_video=kind.sees == "video",
        copy=copy,
        see_all=see_all,
        text_bias=batch.text_bias,
        read_video=with_video,
        read_action=with_action,
    )
    action, video = t_action.new_zeros((), dtype=torch.float32), t_video.new_zeros((), dtype=torch.float32)
    if velocity_action is not None:
        action_error = squared_error(velocity_action, flow_matching.velocity(batch.action, draws.noise_action)).mean(2)
        action = weighted_mean(action_error, ~batch.action_is_pad, flow_matching.loss_weight(t_action, action_shift))
    if velocity_video is not None:
        target = flow_matching.velocity(clean, noise_video)[:, :, 1:]
        video_error = squared_error(velocity_video[:, :, 1:], target).mean((1, 3, 4))
        video = weighted_mean(video_error, ~batch.latent_is_pad, flow_matching.loss_weight(t_video, config.video_shift))
    total = config.lambda_video * video + config.lambda_action * action
    return Losses(total, video, action, velocity_video, velocity_action)


def noisy(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """A clip [B, C, F, h, w] noised at timesteps `t` [B], but for its first frame."""
    return torch.cat((clean[:, :, :1], flow_matching.add_noise(clean[:, :, 1:], noise[:, :, 1:], t)), dim=2)


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
