"""Draws action chunks and future frames from a Fast-WAM, in every mode, computing what is constant once.

What depends on shapes and the schedule only is in `Tables`, what belongs to an observation in `Observed`: the first frame is
clean and sees only itself, so its keys and values, like the text's, aren't a step's.
Source: spec/fastwam.md sections 3.4 and 7.
"""

# B batch, C latent channels, F latent frames, h w latent grid, T actions in a chunk, A numbers per action, D width, L blocks,
# n steps

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from wam_policy.models import flow_matching
from wam_policy.models.fast_wam.model import FastWAM
from wam_policy.models.fast_wam.variants import ActionMode
from wam_policy.models.layers.attention import KeyValue
from wam_policy.models.layers.mot import Stream, run_blocks
from wam_policy.models.layers.rope import Rope, action_rope
from wam_policy.models.layers.transformer import DiT, Text


class Schedule(NamedTuple):
    """Timesteps and step sizes of the sampler, each [steps], from `flow.schedule()`."""

    timesteps: Tensor
    deltas: Tensor


class ScheduleStep(NamedTuple):
    """What an expert makes of one step of a schedule."""

    modulations: list[Tensor]  # [1, 1, 6, D] per block
    embedding: Tensor  # [1, 1, D]
    delta: Tensor
    sigma: Tensor  # how noisy what is denoised is before the step, 1 to 0


class NormalizedTarget(NamedTuple):
    """Actions that are known before a chunk is drawn, as those are that will have been played when it is there."""

    actions: Tensor  # [B, T, A], normalised
    weights: Tensor  # [B, T, 1], 1 where an action is fixed, 0 where it is free, between where it is wanted


class SamplerConstants(NamedTuple):
    """What is the same for every observation of one shape."""

    clean_modulation: list[Tensor]  # [1, 1, 6, D] per block, modulations of the video at timestep 0
    first_frame_rope: Rope  # of the observed frame
    future_rope: Rope  # of the frames after it; of no tokens where they aren't needed
    action_rope: Rope
    action_steps: list[ScheduleStep]
    video_steps: list[ScheduleStep]


class PrefillCache(NamedTuple):
    """What one observation leaves for the steps."""

    video_kv: list[KeyValue]  # keys and values of the observed frame, one pair per block
    video_text: Text
    action_text: Text


def embed_schedule(expert: DiT, schedule: Schedule) -> list[ScheduleStep]:
    """What an expert makes of a schedule, its timesteps embedded all at once."""
    embedding, modulation = expert.embed_time(schedule.timesteps.unsqueeze(1))
    modulations = (x.unsqueeze(1).unbind() for x in expert.modulations(modulation))
    each = zip(
        zip(*modulations, strict=True),
        embedding.unsqueeze(1).unbind(),
        *(x.unbind() for x in schedule),
        strict=True,
    )
    return [
        ScheduleStep(list(per_block), e, delta, t / flow_matching.TIMESTEPS)
        for per_block, e, t, delta in each
    ]


def make_sampler_constants(
    model: FastWAM,
    first_frame: Tensor,
    frames: int,
    horizon: int,
    action_schedule: Schedule,
    video_schedule: Schedule,
) -> SamplerConstants:
    """The tables of a shape.

    Args:
        model: the model.
        first_frame: [B, C, 1, h, w], latents of that shape and device.
        frames: latent frames of a clip F, the first one among them; 1: no others are needed.
        horizon: actions per chunk T.
        action_schedule: the actions' steps.
        video_schedule: the video's steps.
    """
    later = first_frame.expand(-1, -1, frames - 1, -1, -1)
    still = model.video.embed_time(first_frame.new_zeros(1, 1)).modulation
    return SamplerConstants(
        model.video.modulations(still),
        model.video.rope(first_frame),
        model.video.rope(later, start=1),
        action_rope(horizon, model.config.head_dim, first_frame.device, model.precision.rope),
        embed_schedule(model.action, action_schedule),
        embed_schedule(model.video, video_schedule),
    )


def prefill_and_denoise(
    model: FastWAM,
    first_frame: Tensor,
    context: Tensor,
    actions: Tensor,
    future: Tensor | None = None,
    *,
    mode: ActionMode,
    action_schedule: Schedule,
    video_schedule: Schedule,
    decode_video: bool = False,
    target: NormalizedTarget | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One observation's actions and future, everything made for it alone.

    Args:
        model: the model.
        first_frame: [B, C, 1, h, w] latents of the observation.
        context: [B, L + 1, text_dim], from `model.context()`.
        actions: as in `sample`.
        future: as in `sample`.
        mode: as in `sample`.
        action_schedule: the actions' steps.
        video_schedule: the video's steps.
        decode_video: as in `sample`.
        target: as in `sample`.

    Returns:
        As `sample`.
    """
    frames = 1 if future is None else 1 + future.shape[2]
    constant = make_sampler_constants(
        model, first_frame, frames, actions.shape[1], action_schedule, video_schedule
    )
    text = model.video.embed_text(context)
    observed = PrefillCache(
        prefill(model, first_frame, constant, text), text, model.action.embed_text(context)
    )
    return denoise(
        model,
        constant,
        observed,
        actions,
        future,
        mode=mode,
        decode_video=decode_video,
        target=target,
    )


def prefill(
    model: FastWAM, first_frame: Tensor, constants: SamplerConstants, text: Text
) -> list[KeyValue]:
    """Run the video expert once over the observed frame [B, C, 1, h, w]: its keys and values, one pair per block."""
    stream = model.video.stream(
        first_frame, constants.clean_modulation, constants.first_frame_rope, text
    )
    return run_blocks(stream, need_output=False)[1]


def action_step(
    model: FastWAM,
    rope: Rope,
    cache: PrefillCache,
    future_kv: list[KeyValue] | None,
    action: Tensor,
    step: ScheduleStep,
    noise: Tensor,
    target: NormalizedTarget | None,
) -> Tensor:
    """Actions [B, T, A] a step less noisy; what is known of them is put in their place first, as noisy as they are.

    `later` are keys and values of the frames after the observed one; None: the actions don't see them.
    """
    expert = model.action
    if target is not None:
        action = torch.lerp(
            action, (1 - step.sigma) * target.actions + step.sigma * noise, target.weights
        )
    tokens = expert.action_encoder(action.to(expert.action_encoder.weight.dtype))
    stream = Stream(expert, tokens, step.modulations, rope, cache.action_text)
    x, _ = run_blocks(
        stream,
        (cache.video_kv,) if future_kv is None else (cache.video_kv, future_kv),
        return_kv=False,
    )
    return flow_matching.euler_step(action, expert.head(x), step.delta)


def video_step(
    model: FastWAM,
    rope: Rope,
    cache: PrefillCache,
    future: Tensor,
    step: ScheduleStep,
    *,
    decode: bool,
) -> tuple[Tensor, list[KeyValue]]:
    """The frames after the observed one a step less noisy (as they are, if not `read`), and their keys and values before it."""
    stream = model.video.stream(future, step.modulations, rope, cache.video_text)
    x, future_kv = run_blocks(stream, (cache.video_kv,), need_output=decode)
    if not decode:
        return future, future_kv
    velocity = model.video.decode(x, step.embedding, model.video.grid(future))
    return flow_matching.euler_step(future, velocity, step.delta), future_kv


def encode_future(
    model: FastWAM, rope: Rope, clean_modulation: list[Tensor], cache: PrefillCache, future: Tensor
) -> list[KeyValue]:
    """Keys and values of the clean frames after the observed one, latents [B, C, F − 1, h, w]."""
    return run_blocks(
        model.video.stream(future, clean_modulation, rope, cache.video_text),
        (cache.video_kv,),
        need_output=False,
    )[1]


class SamplerSteps(NamedTuple):
    """What sampling is made of: the functions of this module, or their compiled forms."""

    action: Callable[..., Tensor] = action_step
    video: Callable[..., tuple[Tensor, list[KeyValue]]] = video_step
    watch: Callable[..., list[KeyValue]] = encode_future


EAGER_STEPS = SamplerSteps()


def denoise(
    model: FastWAM,
    constants: SamplerConstants,
    cache: PrefillCache,
    actions: Tensor,
    future: Tensor | None,
    *,
    mode: ActionMode,
    decode_video: bool,
    target: NormalizedTarget | None = None,
    steps: SamplerSteps = EAGER_STEPS,
) -> tuple[Tensor, Tensor | None]:
    """Denoise one chunk of actions in any mode and, where the mode or the caller needs them, the frames.

    In the mode "joint" both are denoised in step, and each action step sees the video as it then is; in the mode "idm" the
    actions see the finished frames.

    Args:
        model: the model.
        constants: from `tables()`.
        cache: the observation.
        actions: [B, T, A] initial noise, in the schedule's dtype.
        future: [B, C, F − 1, h, w] initial noise of the frames after the observed one; None: neither side needs them.
        mode: what the actions see.
        decode_video: whether the caller wants the frames.
        target: what of the actions is known: they are kept at the noise of each step, so that the others fit them; a weight
            between 0 and 1 is that of all steps together.
        steps: what a step is made by.

    Returns:
        [B, T, A] normalised actions, and [B, C, F − 1, h, w] latents (None if nobody needed them to the end).
    """
    noise, later = actions, None
    if target is not None:  # as much at every step as makes the weight over all of them
        target = target._replace(
            weights=1 - (1 - target.weights) ** (1 / len(constants.action_steps))
        )
    actions = noise.clone()  # not the same tensor: a step that was compiled for one tensor in two roles would be compiled again
    if future is not None and mode != "joint":
        for step in constants.video_steps:
            future, _ = steps.video(model, constants.future_rope, cache, future, step, decode=True)
        later = (
            steps.watch(model, constants.future_rope, constants.clean_modulation, cache, future)
            if mode == "idm"
            else None
        )
    for action_at, video_at in zip(constants.action_steps, constants.video_steps, strict=True):
        if mode == "joint":  # no action sees what the video's last step would make
            read = decode_video or video_at is not constants.video_steps[-1]
            future, later = steps.video(
                model, constants.future_rope, cache, future, video_at, decode=read
            )
        actions = steps.action(
            model, constants.action_rope, cache, later, actions, action_at, noise, target
        )
    actions = actions if target is None else torch.lerp(actions, target.actions, target.weights)
    return actions, future if decode_video else None
