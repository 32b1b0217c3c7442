"""Fast-WAM: a video expert and an action expert, trained together, of which inference runs the video one once.

Source: spec/fastwam.md sections 2 and 3.
"""

# B batch, C latent channels, F latent frames, h w latent grid, L text tokens, T actions in a chunk, A numbers per action

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wam_policy import flow
from wam_policy.errors import ObservationError
from wam_policy.models.action_dit import ActionDiT
from wam_policy.models.config import FastWAMConfig
from wam_policy.models.layers import KeyValue, action_rope
from wam_policy.models.mot import Stream, action_forward, fast_mask, joint_forward, prefill
from wam_policy.models.video_dit import VideoDiT


class Batch(NamedTuple):
    """One training batch, already normalised and encoded."""

    latents: Tensor  # [B, C, F, h, w], frame 0 is the observation
    context: Tensor  # [B, L, text_dim] prompt embeddings, zero past the prompt's end
    action: Tensor  # [B, T, A]
    proprio: Tensor | None  # [B, P]
    action_is_pad: Tensor  # bool [B, T]
    latent_is_pad: Tensor  # bool [B, F − 1], of the frames after the first


class Draws(NamedTuple):
    """The random numbers of one training step, in the order the reference draws them."""

    noise_video: Tensor  # like the latents
    u_video: Tensor  # [B] uniform
    noise_action: Tensor  # like the actions
    u_action: Tensor  # [B] uniform


class Losses(NamedTuple):
    """Losses of one batch and the predictions they come from."""

    total: Tensor
    video: Tensor
    action: Tensor
    velocity_video: Tensor | None  # [B, C, F, h, w]; None where the video loss is off
    velocity_action: Tensor  # [B, T, A]


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """What the two losses weigh and how their timesteps are drawn."""

    video_shift: float = 5.0
    action_shift: float = 5.0
    lambda_video: float = 1.0  # 0: no video co-training; later frames are then not computed at all
    lambda_action: float = 1.0


class Observed(NamedTuple):
    """What one observation leaves for the action steps: video and text keys and values, one pair per block."""

    video: list[KeyValue]
    text: list[KeyValue]


class FastWAM(nn.Module):
    """The two experts and the proprio encoder."""

    def __init__(self, config: FastWAMConfig) -> None:
        super().__init__()
        self.config = config
        self.video = VideoDiT(config)
        self.action = ActionDiT(config)
        self.proprio_encoder = None if config.proprio_dim is None else nn.Linear(config.proprio_dim, config.text_dim)

    def context(self, prompt: Tensor, proprio: Tensor | None) -> Tensor:
        """Append the proprio token [B, P] to prompt embeddings [B, L, text_dim]."""
        if (self.proprio_encoder is None) != (proprio is None):
            raise ObservationError(
                "this model was trained without proprioception: pass None"
                if self.proprio_encoder is None
                else f"this model needs its {self.config.proprio_dim} numbers of proprioception, got none"
            )
        if self.proprio_encoder is None or proprio is None:
            return prompt
        return torch.cat((prompt, self.proprio_encoder(proprio.to(prompt.dtype)).unsqueeze(1)), dim=1)

    def video_stream(self, latents: Tensor, t: Tensor, text: list[KeyValue]) -> tuple[Stream, Tensor]:
        """Latents [B, C, F, h, w] at timesteps `t` [B, F] -> the video stream and its time embedding [B, F, D]."""
        embedding, time = self.video.embed_time(t)
        return Stream(self.video, self.video.embed(latents), time, self.video.rope(latents), text), embedding

    def action_stream(self, action: Tensor, t: Tensor, text: list[KeyValue]) -> Stream:
        """Noisy actions [B, T, A] at timesteps `t` [B] -> the action stream."""
        _, time = self.action.embed_time(t.unsqueeze(1))
        rope = action_rope(action.shape[1], self.config.head_dim, action.device)
        return Stream(self.action, self.action.action_encoder(action), time, rope, text)

    def forward(
        self,
        latents: Tensor,
        t_video: Tensor,
        action: Tensor,
        t_action: Tensor,
        context: Tensor,
        *,
        read_video: bool = True,
    ) -> tuple[Tensor | None, Tensor]:
        """Predict both velocities.

        Args:
            latents: [B, C, F, h, w], frame 0 clean, the others noisy.
            t_video: [B] timestep of the noisy frames.
            action: [B, T, A] noisy actions.
            t_action: [B] their timestep.
            context: [B, L + 1, text_dim], from `context()`.
            read_video: False leaves the video's velocity out.

        Returns:
            Video velocity [B, C, F, h, w] (None if not read) and action velocity [B, T, A].
        """
        frames, rows, columns = grid = self.video.grid(latents)
        t_frames = torch.cat((torch.zeros_like(t_video).unsqueeze(1), t_video.unsqueeze(1).expand(-1, frames - 1)), dim=1)
        video, embedding = self.video_stream(latents, t_frames, self.video.embed_text(context))
        actions = self.action_stream(action, t_action, self.action.embed_text(context))
        mask = fast_mask(frames, rows * columns, action.shape[1], latents.device)
        x, y = joint_forward(video, actions, mask, read_video=read_video)
        return self.video.read(x, embedding, grid) if read_video else None, self.action.head(y)


def draw(batch: Batch, generator: torch.Generator | None = None) -> Draws:
    """Draw the random numbers of one training step, in the reference's order."""
    device, b = batch.latents.device, len(batch.latents)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype)

    def uniform() -> Tensor:
        return torch.rand(b, generator=generator, device=device)

    return Draws(normal(batch.latents), uniform(), normal(batch.action), uniform())


def training_losses(model: FastWAM, batch: Batch, draws: Draws, config: LossConfig) -> Losses:
    """Flow-matching losses of one batch. Source: spec/fastwam.md section 3.2.

    With `lambda_video` 0 nothing that matters reads the later frames, so they are dropped: same action loss, same gradients.
    """
    with_video = config.lambda_video != 0
    clean = batch.latents if with_video else batch.latents[:, :, :1]
    noise_video = draws.noise_video[:, :, : clean.shape[2]]
    t_video = flow.timesteps(draws.u_video, config.video_shift, clean.dtype)
    t_action = flow.timesteps(draws.u_action, config.action_shift, batch.action.dtype)
    noisy = torch.cat((clean[:, :, :1], flow.add_noise(clean, noise_video, t_video)[:, :, 1:]), dim=2)
    velocity_video, velocity_action = model(
        noisy,
        t_video,
        flow.add_noise(batch.action, draws.noise_action, t_action),
        t_action,
        model.context(batch.context, batch.proprio),
        read_video=with_video,
    )
    action_error = _squared_error(velocity_action, flow.velocity(batch.action, draws.noise_action)).mean(2)
    action = _weighted_mean(action_error, ~batch.action_is_pad, flow.loss_weight(t_action, config.action_shift))
    video = action.new_zeros(())
    if velocity_video is not None:
        target = flow.velocity(clean, noise_video)[:, :, 1:]
        video_error = _squared_error(velocity_video[:, :, 1:], target).mean((1, 3, 4))
        video = _weighted_mean(video_error, ~batch.latent_is_pad, flow.loss_weight(t_video, config.video_shift))
    total = config.lambda_video * video + config.lambda_action * action
    return Losses(total, video, action, velocity_video, velocity_action)


def _squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction.float() - target.float()).square()


def _weighted_mean(error: Tensor, valid: Tensor, weight: Tensor) -> Tensor:
    """Mean of `error` [B, K] over each sample's valid places, weighted per sample [B], averaged over the batch."""
    mean = (error * valid).sum(1) / valid.sum(1).clamp(min=1)
    return (mean * weight).mean()


def latent_padding(image_is_pad: Tensor, temporal_ratio: int = 4) -> Tensor:
    """Padding of pixel frames, bool [B, 1 + ratio·n] -> of latent frames after the first, [B, n]: all of their frames."""
    return image_is_pad[:, 1:].unflatten(1, (-1, temporal_ratio)).all(2)


def observe(model: FastWAM, first_frame: Tensor, context: Tensor) -> Observed:
    """Run the video expert once over the observed frame.

    Args:
        model: the model.
        first_frame: [B, C, 1, h, w] latents of the observation.
        context: [B, L + 1, text_dim], from `model.context()`.

    Returns:
        All the action steps need of the observation.
    """
    t = first_frame.new_zeros(len(first_frame), 1)
    stream, _ = model.video_stream(first_frame, t, model.video.embed_text(context))
    return Observed(prefill(stream), model.action.embed_text(context))


def act(model: FastWAM, observed: Observed, noise: Tensor, timesteps: Tensor, deltas: Tensor) -> Tensor:
    """Denoise one chunk of actions.

    Args:
        model: the model.
        observed: from `observe()`.
        noise: [B, T, A] initial noise.
        timesteps: [steps], from `flow.schedule()`.
        deltas: [steps], from `flow.schedule()`.

    Returns:
        [B, T, A] normalised actions.
    """
    action = noise
    for t, delta in zip(timesteps.unbind(), deltas.unbind(), strict=True):
        stream = model.action_stream(action, t.expand(len(action)), observed.text)
        action = flow.euler_step(action, model.action.head(action_forward(stream, observed.video)), delta)
    return action
