"""Draws action chunks and future frames from a Fast-WAM, in every mode, computing what is constant once.

What depends on shapes and the schedule only is in `Tables`, what belongs to an observation in `Observed`: the first frame is
clean and sees only itself, so its keys and values, like the text's, aren't a step's.
Source: spec/fastwam.md sections 3.4 and 7.
"""

# B batch, C latent channels, F latent frames, h w latent grid, T actions in a chunk, A numbers per action, D width, L blocks,
# n steps

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wam_policy import flow
from wam_policy.models.fast_wam import FastWAM
from wam_policy.models.layers import DiT, KeyValue, Rope, Text, action_rope
from wam_policy.models.mot import Stream, run
from wam_policy.models.variants import ActionMode


class Schedule(NamedTuple):
    """Timesteps and step sizes of the sampler, each [steps], from `flow.schedule()`."""

    timesteps: Tensor
    deltas: Tensor


class Steps(NamedTuple):
    """What an expert makes of a schedule."""

    modulations: Tensor  # [n, L, 1, 1, 6, D]
    embeddings: Tensor  # [n, 1, 1, D]
    deltas: Tensor  # [n]


class Tables(NamedTuple):
    """What is the same for every observation of one shape."""

    still: Tensor  # [L, 1, 1, 6, D], modulations of the video at timestep 0
    first: Rope  # of the observed frame
    later: Rope  # of the frames after it; of no tokens where they aren't needed
    actions: Rope
    action_steps: Steps
    video_steps: Steps


class Observed(NamedTuple):
    """What one observation leaves for the steps."""

    video: list[KeyValue]  # keys and values of the observed frame, one pair per block
    video_text: Text
    action_text: Text


def steps(expert: DiT, schedule: Schedule) -> Steps:
    """What an expert makes of a schedule."""
    embedding, modulation = expert.embed_time(schedule.timesteps.unsqueeze(1))
    modulations = torch.stack(expert.modulations(modulation.unsqueeze(1)), dim=1)
    return Steps(modulations, embedding.unsqueeze(1), schedule.deltas)


def tables(
    model: FastWAM, first_frame: Tensor, frames: int, horizon: int, action_schedule: Schedule, video_schedule: Schedule
) -> Tables:
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
    return Tables(
        torch.stack(model.video.modulations(still)),
        model.video.rope(first_frame),
        model.video.rope(later, start=1),
        action_rope(horizon, model.config.head_dim, first_frame.device, model.precision.rope),
        steps(model.action, action_schedule),
        steps(model.video, video_schedule),
    )


def draw(
    model: FastWAM,
    first_frame: Tensor,
    context: Tensor,
    actions: Tensor,
    future: Tensor | None = None,
    *,
    mode: ActionMode,
    action_schedule: Schedule,
    video_schedule: Schedule,
    read_video: bool = False,
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
        read_video: as in `sample`.

    Returns:
        As `sample`.
    """
    frames = 1 if future is None else 1 + future.shape[2]
    constant = tables(model, first_frame, frames, actions.shape[1], action_schedule, video_schedule)
    text = model.video.embed_text(context)
    observed = Observed(observe(model, first_frame, constant, text), text, model.action.embed_text(context))
    return sample(model, constant, observed, actions, future, mode=mode, read_video=read_video)


def observe(model: FastWAM, first_frame: Tensor, tables: Tables, text: Text) -> list[KeyValue]:
    """Run the video expert once over the observed frame [B, C, 1, h, w]: its keys and values, one pair per block."""
    stream = model.video.stream(first_frame, tables.still.unbind(), tables.first, text)
    return run(stream, read=False)[1]


def sample(
    model: FastWAM,
    tables: Tables,
    observed: Observed,
    actions: Tensor,
    future: Tensor | None,
    *,
    mode: ActionMode,
    read_video: bool,
) -> tuple[Tensor, Tensor | None]:
    """Denoise one chunk of actions in any mode and, where the mode or the caller needs them, the frames.

    Args:
        model: the model.
        tables: from `tables()`.
        observed: the observation.
        actions: [B, T, A] initial noise, in the schedule's dtype.
        future: [B, C, F − 1, h, w] initial noise of the frames after the observed one; None: neither side needs them.
        mode: what the actions see.
        read_video: whether the caller wants the frames.

    Returns:
        [B, T, A] normalised actions, and [B, C, F − 1, h, w] latents (None if nobody needed them to the end).
    """
    if mode == "joint":
        assert future is not None
        return act_jointly(model, tables, observed, actions, future, read_video=read_video)
    if future is not None:
        future = imagine(model, tables, observed, future)
    later = watch_future(model, tables, observed, future) if mode == "idm" and future is not None else None
    return act(model, tables, observed, actions, later), future if read_video else None


def act(model: FastWAM, tables: Tables, observed: Observed, noise: Tensor, later: list[KeyValue] | None = None) -> Tensor:
    """Denoise one chunk of actions, [B, T, A].

    Args:
        model: the model.
        tables: from `tables()`.
        observed: the observation.
        noise: [B, T, A] initial noise, in the schedule's dtype.
        later: keys and values of the frames after the observed one, from `watch_future()`; None: the actions don't see them.
    """
    action = noise
    for step in range(len(tables.action_steps.deltas)):
        action = _action_step(model, tables, observed, action, step, later)
    return action


def imagine(model: FastWAM, tables: Tables, observed: Observed, noise: Tensor) -> Tensor:
    """Denoise the frames after the observed one, latents [B, C, F − 1, h, w], from noise in the schedule's dtype."""
    future = noise
    for step in range(len(tables.video_steps.deltas)):
        future, _ = _video_step(model, tables, observed, future, step, read=True)
    return future


def watch_future(model: FastWAM, tables: Tables, observed: Observed, future: Tensor) -> list[KeyValue]:
    """Keys and values of the clean frames after the observed one, latents [B, C, F − 1, h, w]."""
    stream = model.video.stream(future, tables.still.unbind(), tables.later, observed.video_text)
    return run(stream, (observed.video,), read=False)[1]


def act_jointly(
    model: FastWAM, tables: Tables, observed: Observed, noise_action: Tensor, noise_video: Tensor, *, read_video: bool
) -> tuple[Tensor, Tensor | None]:
    """Denoise actions and the frames after the observed one in step; each action step sees the video as it then is.

    Args:
        model: the model.
        tables: from `tables()`, with as many steps of the video as of the actions.
        observed: the observation.
        noise_action: [B, T, A] initial noise.
        noise_video: [B, C, F − 1, h, w] initial noise.
        read_video: False leaves out the video's last step, which no action sees.

    Returns:
        [B, T, A] normalised actions, and [B, C, F − 1, h, w] latents (None if not read).
    """
    action, future, last = noise_action, noise_video, len(tables.action_steps.deltas) - 1
    for step in range(last + 1):
        future, later = _video_step(model, tables, observed, future, step, read=read_video or step < last)
        action = _action_step(model, tables, observed, action, step, later)
    return action, future if read_video else None


def _action_step(
    model: FastWAM, tables: Tables, observed: Observed, action: Tensor, step: int, later: list[KeyValue] | None
) -> Tensor:
    expert, schedule = model.action, tables.action_steps
    tokens = expert.action_encoder(action.to(expert.action_encoder.weight.dtype))
    stream = Stream(expert, tokens, schedule.modulations.select(0, step).unbind(), tables.actions, observed.action_text)
    x, _ = run(stream, (observed.video,) if later is None else (observed.video, later), keep=False)
    return flow.euler_step(action, expert.head(x), schedule.deltas.select(0, step))


def _video_step(
    model: FastWAM, tables: Tables, observed: Observed, future: Tensor, step: int, *, read: bool
) -> tuple[Tensor, list[KeyValue]]:
    """The frames after the observed one a step less noisy (as they are, if not `read`), and their keys and values before."""
    video, schedule = model.video, tables.video_steps
    stream = video.stream(future, schedule.modulations.select(0, step).unbind(), tables.later, observed.video_text)
    x, cache = run(stream, (observed.video,), read=read)
    if not read:
        return future, cache
    velocity = video.read(x, schedule.embeddings.select(0, step), video.grid(future))
    return flow.euler_step(future, velocity, schedule.deltas.select(0, step)), cache
