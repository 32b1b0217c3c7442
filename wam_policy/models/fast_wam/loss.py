"""Training losses of Fast-WAM: flow matching of the video and of the actions, in every variant.

The random numbers of a step are an argument, so that a step can be repeated exactly.
See docs/method.md, "Training losses".
"""

# B batch, C latent channels, F latent frames, h w latent grid, L text tokens,
# T actions in a chunk, A numbers per action, P numbers of proprioception

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from wam_policy.errors import ConfigError
from wam_policy.models import flow_matching
from wam_policy.models.fast_wam.model import FastWAM
from wam_policy.models.fast_wam.variants import VARIANTS, VariantName

DEFAULT_SHIFT = 5.0  # of a schedule that is not configured
CONTEXT_NOISE_PROB = 0.5  # that a sample's context clip is noised, as in the reference


class Batch(NamedTuple):
    """One training batch, normalised and encoded."""

    latents: Tensor  # [B, C, F, h, w], frame 0 is the observation
    context: Tensor  # [B, L, text_dim] prompt embeddings, zero past the prompt's end
    action: Tensor  # [B, T, A]
    proprio: Tensor | None  # [B, P]
    action_is_pad: Tensor  # bool [B, T]
    latent_is_pad: Tensor  # bool [B, F − 1], of the frames after the first
    # [B, L] biases of rows that stand for several; see `text_padding.condense_padding`.
    text_bias: Tensor | None = None


class ContextClipNoise(NamedTuple):
    """Random numbers of the context clip, the second copy of the clip."""

    u_noised: Tensor  # [B] uniform; the clip is noised where it is below CONTEXT_NOISE_PROB
    u_context: Tensor  # [B] uniform, gives the timestep
    noise_context: Tensor  # [B, C, F, h, w] normal
    # [B] uniform; the actions attend to the whole clip where it is below `action_idm_prob`.
    u_attend_full_video: Tensor


class TrainingNoise(NamedTuple):
    """Random numbers of one training step."""

    noise_video: Tensor  # [B, C, F, h, w] normal
    u_video: Tensor  # [B] uniform, gives the timestep of the video
    noise_action: Tensor  # [B, T, A] normal
    u_action: Tensor  # [B] uniform, gives the timestep of the actions
    context_clip: ContextClipNoise | None = None  # None: the variant has no context clip


class LossOutput(NamedTuple):
    """Losses of one batch and the predictions they were computed from.

    A Fast-WAM predicts velocities. A Light-WAM predicts the velocity of the pooled video and the
    actions themselves.
    """

    total: Tensor
    video: Tensor
    action: Tensor
    # None: the loss is off, or the prediction was dropped to free its memory.
    video_prediction: Tensor | None = None  # [B, C, F, h, w]
    action_prediction: Tensor | None = None  # [B, T, A]


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Weights of the two losses and schedules of their timesteps."""

    video_shift: float = DEFAULT_SHIFT
    action_shift: float | None = None
    """Shift of the schedule of the actions. Default: that of the initial weights, else 5."""
    lambda_video: float = 1.0
    """Weight of the video loss. 0 disables video co-training and what only it needs."""
    lambda_action: float = 1.0
    """Weight of the action loss. 0 trains the video only; the action expert is not run."""
    action_idm_prob: float = 0.5
    """Optional-IDM: fraction of the samples whose actions attend to the whole video."""

    def __post_init__(self) -> None:
        if self.lambda_video == 0 and self.lambda_action == 0:
            raise ConfigError(
                "`lambda_video` and `lambda_action` are both 0, so nothing is trained; "
                "set at least one of them"
            )
        if not 0 <= self.action_idm_prob <= 1:
            raise ConfigError(f"`action_idm_prob` must lie in [0, 1], got {self.action_idm_prob}")


def sample_fast_noise(
    batch: Batch,
    generator: torch.Generator | None = None,
    variant: VariantName = "fast",
) -> TrainingNoise:
    """Draw the random numbers of one training step, in the order of the reference.

    Args:
        batch: Batch of the step.
        generator: Source of the random numbers; None: PyTorch's global one.
        variant: Variant that is trained.
    """
    device = batch.latents.device

    def normal(like: Tensor) -> Tensor:
        """Draw normal numbers in the shape and type of a tensor."""
        return torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype)

    def uniform() -> Tensor:
        """Draw one uniform number in [0, 1) per sample."""
        size = len(batch.latents)
        return torch.rand(size, generator=generator, device=device, dtype=torch.float32)

    noise = TrainingNoise(
        noise_video=normal(batch.latents),
        u_video=uniform(),
        noise_action=normal(batch.action),
        u_action=uniform(),
    )
    if not VARIANTS[variant].uses_context_clip:
        return noise

    context_clip = ContextClipNoise(
        u_noised=uniform(),
        u_context=uniform(),
        noise_context=normal(batch.latents),
        u_attend_full_video=uniform(),
    )
    return noise._replace(context_clip=context_clip)


def fast_wam_losses(
    model: FastWAM,
    batch: Batch,
    noise: TrainingNoise,
    config: LossConfig,
    variant: VariantName = "fast",
) -> LossOutput:
    """Compute the flow-matching losses of one batch.

    A loss of weight 0 is not computed, nor are the passes and frames that only it needs; the other
    loss and its gradients do not change.

    Args:
        model: Model that is trained.
        batch: Batch of the step.
        noise: Random numbers of the step, from `sample_fast_noise`.
        config: Weights and schedules of the losses.
        variant: Variant that is trained.

    Raises:
        ConfigError: The variant needs noise for a context clip and there is none.
    """
    with_video = config.lambda_video != 0
    with_action = config.lambda_action != 0
    attend_video = VARIANTS[variant].attends_to == "video"

    # Frames after the first are needed for the video loss or as context of the actions.
    needs_future = with_video or attend_video
    clean = batch.latents if needs_future else batch.latents[:, :, :1]
    noise_video = noise.noise_video[:, :, : clean.shape[2]]

    # Timesteps
    action_shift = DEFAULT_SHIFT if config.action_shift is None else config.action_shift
    time_dtype = model.precision.time or clean.dtype
    t_video = flow_matching.timesteps(noise.u_video, config.video_shift, time_dtype)
    t_action = flow_matching.timesteps(noise.u_action, action_shift, time_dtype)

    context_clip, attend_full_video = _context_clip(clean, noise, config, variant, time_dtype)
    video_prediction, action_prediction = model(
        noise_clip(clean, noise_video, t_video),
        t_video,
        flow_matching.add_noise(batch.action, noise.noise_action, t_action),
        t_action,
        model.context(batch.context, batch.proprio),
        attend_video=attend_video,
        context_clip=context_clip,
        attend_full_video=attend_full_video,
        text_bias=batch.text_bias,
        decode_video=with_video,
        decode_actions=with_action,
    )

    action = _action_loss(action_prediction, batch, noise, t_action, action_shift)
    video = video_loss(
        video_prediction, clean, noise_video, batch.latent_is_pad, t_video, config.video_shift
    )
    total = config.lambda_video * video + config.lambda_action * action
    return LossOutput(total, video, action, video_prediction, action_prediction)


def _context_clip(
    clean: Tensor,
    noise: TrainingNoise,
    config: LossConfig,
    variant: VariantName,
    time_dtype: torch.dtype,
) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
    """Return the copy of the clip that the actions attend to, where the variant has one.

    Args:
        clean: [B, C, F, h, w] latents.
        noise: Random numbers of the step.
        config: Schedules of the losses.
        variant: Variant that is trained.
        time_dtype: Type of the timesteps.

    Returns:
        The copy [B, C, F, h, w] with its timesteps [B], which are 0 where it stays clean (None: it
        is not needed); and which samples attend to all of its frames, bool [B] (None: all).
    """
    if not VARIANTS[variant].uses_context_clip or config.lambda_action == 0:
        return None, None
    draws = noise.context_clip
    if draws is None:
        raise ConfigError(
            f"the variant {variant!r} needs random numbers for its context clip; draw them with "
            f"`sample_fast_noise(batch, variant={variant!r})`"
        )

    noised = draws.u_noised < CONTEXT_NOISE_PROB
    t = flow_matching.timesteps(draws.u_context, config.video_shift, time_dtype) * noised
    clip = noise_clip(clean, draws.noise_context, t)

    attend_full_video = None
    if VARIANTS[variant].optional_video:
        attend_full_video = draws.u_attend_full_video < config.action_idm_prob
    return (clip, t), attend_full_video


def _action_loss(
    prediction: Tensor | None,
    batch: Batch,
    noise: TrainingNoise,
    t: Tensor,
    shift: float,
) -> Tensor:
    """Return the flow-matching loss of predicted velocities [B, T, A]; 0 without a prediction."""
    if prediction is None:
        return t.new_zeros((), dtype=torch.float32)
    target = flow_matching.velocity(batch.action, noise.noise_action)
    error = squared_error(prediction, target).mean(2)
    weight = flow_matching.loss_weight(t, shift)
    return weighted_mean(error, ~batch.action_is_pad, weight)


def video_loss(
    prediction: Tensor | None,
    clean: Tensor,
    noise: Tensor,
    is_pad: Tensor,
    t: Tensor,
    shift: float,
) -> Tensor:
    """Return the flow-matching loss of the frames after the observed one.

    Args:
        prediction: [B, C, F, h, w] predicted velocity; None: the loss is 0.
        clean: [B, C, F, h, w] latents.
        noise: [B, C, F, h, w].
        is_pad: bool [B, F − 1], of the frames after the first.
        t: [B] timesteps.
        shift: Shift of their schedule.
    """
    if prediction is None:
        return t.new_zeros((), dtype=torch.float32)
    target = flow_matching.velocity(clean, noise)
    future_prediction = prediction[:, :, 1:]
    future_target = target[:, :, 1:]
    error = squared_error(future_prediction, future_target)
    frame_error = error.mean((1, 3, 4))
    weight = flow_matching.loss_weight(t, shift)
    return weighted_mean(frame_error, ~is_pad, weight)


def noise_clip(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Noise all frames of a clip but the first.

    Args:
        clean: [B, C, F, h, w] latents.
        noise: [B, C, F, h, w].
        t: [B] timesteps.
    """
    observed = clean[:, :, :1]
    future = clean[:, :, 1:]
    noisy = flow_matching.add_noise(future, noise[:, :, 1:], t)
    return torch.cat((observed, noisy), dim=2)


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the squared differences, float32."""
    return (prediction.float() - target.float()).square()


def weighted_mean(error: Tensor, valid: Tensor, weight: Tensor) -> Tensor:
    """Average errors over the valid positions of each sample, then over the batch with weights.

    Args:
        error: [B, K] errors at K positions.
        valid: bool [B, K]; a sample without a valid position contributes 0.
        weight: [B] weight of each sample.
    """
    count = valid.sum(1).clamp(min=1)
    mean = (error * valid).sum(1) / count
    return (mean * weight).mean()


def latent_padding(image_is_pad: Tensor, temporal_ratio: int = 4) -> Tensor:
    """Return which latent frames after the first are padding: those whose images all are.

    Args:
        image_is_pad: bool [B, 1 + ratio·n].
        temporal_ratio: Images per latent frame.

    Returns:
        bool [B, n].
    """
    groups = image_is_pad[:, 1:].unflatten(1, (-1, temporal_ratio))
    return groups.all(2)
