"""Draws action chunks and future frames from a Fast-WAM, in every mode, computing what is constant over the steps once.

Source: spec/fastwam.md section 3.4. The first frame is clean and sees only itself, so its keys and values, like the text's,
belong to the observation and not to a step.
"""

# B batch, C latent channels, F latent frames, h w latent grid, L text tokens, T actions in a chunk, A numbers per action

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from wam_policy import flow
from wam_policy.models.fast_wam import FastWAM
from wam_policy.models.layers import DiT, KeyValue, TimeEmbedding
from wam_policy.models.mot import join, run
from wam_policy.models.variants import ActionMode


class Schedule(NamedTuple):
    """Timesteps and step sizes of the sampler, each [steps], from `flow.schedule()`."""

    timesteps: Tensor
    deltas: Tensor


class Observed(NamedTuple):
    """What one observation leaves for the steps: keys and values, one pair per block."""

    video: list[KeyValue]  # of the observed frame
    video_text: list[KeyValue]
    action_text: list[KeyValue]


def observe(model: FastWAM, first_frame: Tensor, context: Tensor) -> Observed:
    """Run the video expert once over the observed frame.

    Args:
        model: the model.
        first_frame: [B, C, 1, h, w] latents of the observation.
        context: [B, L + 1, text_dim], from `model.context()`.

    Returns:
        All the steps need of the observation.
    """
    text = model.video.embed_text(context)
    _, cache = model.watch(first_frame, first_frame.new_zeros(len(first_frame)), text, read=False)
    return Observed(cache, text, model.action.embed_text(context))


def sample(
    model: FastWAM,
    observed: Observed,
    actions: Tensor,
    future: Tensor | None,
    *,
    mode: ActionMode,
    action_schedule: Schedule,
    video_schedule: Schedule,
    read_video: bool,
) -> tuple[Tensor, Tensor | None]:
    """Denoise one chunk of actions in any mode and, where the mode or the caller needs them, the frames.

    Args:
        model: the model.
        observed: from `observe()`.
        actions: [B, T, A] initial noise.
        future: [B, C, F − 1, h, w] initial noise of the frames after the observed one; None: neither side needs them.
        mode: what the actions see.
        action_schedule: the actions' steps.
        video_schedule: the video's steps.
        read_video: whether the caller wants the frames.

    Returns:
        [B, T, A] normalised actions, and [B, C, F − 1, h, w] latents (None if nobody needed them to the end).
    """
    if future is None:
        return act(model, observed, actions, action_schedule), None
    if mode == "joint":
        return act_jointly(model, observed, actions, future, action_schedule, video_schedule, read_video=read_video)
    future = imagine(model, observed, future, video_schedule)
    seen = watch_future(model, observed, future) if mode == "idm" else None
    return act(model, observed, actions, action_schedule, seen), future


def act(model: FastWAM, observed: Observed, noise: Tensor, schedule: Schedule, seen: list[KeyValue] | None = None) -> Tensor:
    """Denoise one chunk of actions.

    Args:
        model: the model.
        observed: from `observe()`.
        noise: [B, T, A] initial noise, in the schedule's dtype.
        schedule: the actions' steps.
        seen: the video that the actions see, from `watch_future()`; None: the observed frame.

    Returns:
        [B, T, A] normalised actions.
    """
    action, seen = noise, observed.video if seen is None else seen
    for time, delta in steps(model.action, schedule):
        velocity = model.action_velocity(action, time.modulation, observed.action_text, seen)
        action = flow.euler_step(action, velocity, delta)
    return action


def imagine(model: FastWAM, observed: Observed, noise: Tensor, schedule: Schedule) -> Tensor:
    """Denoise the frames after the observed one.

    Args:
        model: the model.
        observed: from `observe()`.
        noise: [B, C, F − 1, h, w] initial noise, in the schedule's dtype.
        schedule: the video's steps.

    Returns:
        [B, C, F − 1, h, w] latents.
    """
    future = noise
    for time, delta in steps(model.video, schedule):
        velocity, _ = _future(model, observed, future, time, read=True)
        assert velocity is not None
        future = flow.euler_step(future, velocity, delta)
    return future


def watch_future(model: FastWAM, observed: Observed, future: Tensor) -> list[KeyValue]:
    """Keys and values of the observed frame and the clean frames after it, latents [B, C, F − 1, h, w]."""
    _, cache = _future(model, observed, future, model.video.embed_time(future.new_zeros(1, 1)), read=False)
    return _clip(observed, cache)


def act_jointly(
    model: FastWAM,
    observed: Observed,
    noise_action: Tensor,
    noise_video: Tensor,
    action_schedule: Schedule,
    video_schedule: Schedule,
    *,
    read_video: bool,
) -> tuple[Tensor, Tensor | None]:
    """Denoise actions and the frames after the observed one in step; each action step sees the video as it then is.

    Args:
        model: the model.
        observed: from `observe()`.
        noise_action: [B, T, A] initial noise.
        noise_video: [B, C, F − 1, h, w] initial noise.
        action_schedule: the actions' steps.
        video_schedule: the video's steps, as many.
        read_video: False leaves out the video's last step, which no action sees.

    Returns:
        [B, T, A] normalised actions, and [B, C, F − 1, h, w] latents (None if not read).
    """
    action, future, last = noise_action, noise_video, len(action_schedule.timesteps) - 1
    both = zip(steps(model.action, action_schedule), steps(model.video, video_schedule), strict=True)
    for i, ((time_action, action_delta), (time_video, video_delta)) in enumerate(both):
        velocity, cache = _future(model, observed, future, time_video, read=read_video or i < last)
        seen = _clip(observed, cache)
        action_velocity = model.action_velocity(action, time_action.modulation, observed.action_text, seen)
        action = flow.euler_step(action, action_velocity, action_delta)
        if velocity is not None:
            future = flow.euler_step(future, velocity, video_delta)
    return action, future if read_video else None


def steps(expert: DiT, schedule: Schedule) -> Iterator[tuple[TimeEmbedding, Tensor]]:
    """What an expert makes of each timestep, shared by all samples, computed for all steps at once; and the step's size."""
    embedded = (x.split(1) for x in expert.embed_time(schedule.timesteps.unsqueeze(1)))
    for embedding, modulation, delta in zip(*embedded, schedule.deltas.unbind(), strict=True):
        yield TimeEmbedding(embedding, modulation), delta


def _clip(observed: Observed, later: list[KeyValue]) -> list[KeyValue]:
    """Keys and values of the observed frame and of the frames after it, together."""
    return [join(first, after) for first, after in zip(observed.video, later, strict=True)]


def _future(
    model: FastWAM, observed: Observed, future: Tensor, time: TimeEmbedding, *, read: bool
) -> tuple[Tensor | None, list[KeyValue]]:
    """Velocity (None if not read), and keys and values, of the frames after the observed one at one timestep."""
    stream = model.video.stream(future, time.modulation, observed.video_text, start=1)
    x, cache = run(stream, observed.video, read=read)
    return model.video.read(x, time.embedding, model.video.grid(future)) if read else None, cache
