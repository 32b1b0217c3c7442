"""Runs a model on one batch of checked observations: its chunks and, where they are wanted, the latents of the future."""

# B batch, H W pixels, P numbers of proprioception, C latent channels, F latent frames, h w latent grid, T actions in a chunk,
# A numbers per action

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from wam_policy.config import PolicyConfig
from wam_policy.errors import ConfigError, ObservationError
from wam_policy.models import flow_matching
from wam_policy.models.fast_wam import sampling as fast_sampling
from wam_policy.models.fast_wam.model import FastWAM
from wam_policy.models.fast_wam.variants import ActionMode
from wam_policy.models.light_wam import sampling as light_sampling
from wam_policy.models.light_wam.model import LightWAM
from wam_policy.models.registry import Model
from wam_policy.normalize import Normalization

Noise = Callable[[tuple[int, ...]], Tensor]
"""Gives initial noise of a shape, without its batch axis, as [B, *shape]."""


class Seen(NamedTuple):
    """A batch of observations as a model takes them."""

    canvas: np.ndarray  # float32 [B, 3, H, W] in [-1, 1]
    proprio: np.ndarray | None  # float32 [B, P], normalised
    prompts: Sequence[str]
    starts: np.ndarray  # bool [B], where an episode begins


class Known(NamedTuple):
    """Actions that are known before a chunk is predicted, as those are that will have been played when it is there."""

    actions: np.ndarray  # [T, A] or [B, T, A], in the policy's units
    weights: np.ndarray  # [T] or [B, T]: 1 where an action is fixed, 0 where it is free; between, it is drawn towards it


class Wish(NamedTuple):
    """What a caller wants of a model."""

    horizon: int  # actions per chunk
    noise: Noise  # of the actions
    noise_video: Noise
    mode: ActionMode | None = None  # None: the contract's
    imagine: bool = False  # the future's latents too
    known: fast_sampling.Known | None = None  # of the actions, on the CPU


@torch.no_grad()
def act(
    config: PolicyConfig, model: Model, first: Tensor, context: Tensor, frames: int, wish: Wish
) -> tuple[Tensor, Tensor | None]:
    """Chunks, and latents of the clips that begin with the observed frames.

    Args:
        config: the policy's contract.
        model: its model.
        first: [B, C, 1, h, w] latents of the observed frames.
        context: [B, L + 1, text_dim], from `model.context()`.
        frames: latent frames of a clip.
        wish: what is wanted.

    Returns:
        [B, T, A] normalised actions, and [B, C, F, h, w] (None if not wanted); a Light-WAM imagines on its pooled grid.

    Raises:
        ConfigError: the model can't do it.
    """
    mode = config.action_mode(wish.mode)
    if isinstance(model, FastWAM):
        return _denoise(config, model, first, context, frames, wish, mode)
    actions = blended(model.act(first, context, wish.horizon), wish.known)
    if not wish.imagine:
        return actions, None
    imaginable(model)
    future, text = _future_noise(model, first, frames, wish, model.config.video_pool), model.video.embed_text(context)
    return actions, light_sampling.imagine(model, first, text, future, schedule(config, model))


def imaginable(model: Model) -> None:
    """Refuse a model that can't imagine.

    Raises:
        ConfigError: it is a lean one.
    """
    if isinstance(model, LightWAM) and model.config.lean_steps is not None:
        raise ConfigError("a lean checkpoint only acts: its video head is gone; load the fat or slim one to imagine")


def known_actions(known: Known | None, normalization: Normalization, shape: tuple[int, int, int]) -> fast_sampling.Known | None:
    """Known actions of a batch, normalised, for chunks of a shape [B, T, A].

    Raises:
        ObservationError: they have another shape, or weights that aren't weights.
    """
    if known is None:
        return None
    actions, weights = np.asarray(known.actions, np.float32), np.asarray(known.weights, np.float32)
    if actions.shape not in (shape, shape[1:]) or weights.shape not in (shape[:2], shape[1:2]):
        raise ObservationError(
            f"known actions: expected {list(shape)} and weights {list(shape[:2])}, got {list(actions.shape)} and "
            f"{list(weights.shape)}"
        )
    if not (np.isfinite(actions).all() and (weights >= 0).all() and (weights <= 1).all()):
        raise ObservationError("known actions must be finite and their weights between 0 and 1")
    normalised = torch.from_numpy(normalization.normalize(actions)).expand(shape)
    return fast_sampling.Known(normalised, torch.from_numpy(weights).expand(shape[:2]).unsqueeze(-1))


def blended(actions: Tensor, known: fast_sampling.Known | None) -> Tensor:
    """Actions [B, T, A] of a model that is asked once, mixed with what is known of them."""
    return actions if known is None else torch.lerp(actions, *(x.to(actions) for x in known))


def initial_noise(
    size: int,
    shape: tuple[int, ...],
    given: np.ndarray | Tensor | None,
    generator: torch.Generator,
    *,
    fixed: int | None,
    seeds: Sequence[int] | None = None,
) -> Tensor:
    """Initial noise [B, *shape], drawn in float32 on the CPU so that every device starts from the same.

    Args:
        size: B.
        shape: of one sample.
        given: the caller's own, [*shape] or [B, *shape].
        generator: what new noise is drawn from.
        fixed: the seed of one noise for all samples; None: new noise for each.
        seeds: a seed for each sample, in its place.

    Raises:
        ObservationError: the caller's has another shape, or there are more or fewer seeds than samples.
    """
    if given is None and seeds is not None:
        if len(seeds) != size:
            raise ObservationError(f"seeds: expected one for each of {size} observations, got {len(seeds)}")
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds])
    if given is not None:
        noise = torch.as_tensor(given, dtype=torch.float32)
        if noise.shape not in (shape, (size, *shape)):
            raise ObservationError(f"noise: expected {list(shape)} or {[size, *shape]}, got {list(noise.shape)}")
        return noise.expand(size, *shape)
    if fixed is None:
        return torch.stack([torch.randn(shape, generator=generator) for _ in range(size)])
    return torch.randn(shape, generator=torch.Generator().manual_seed(fixed)).expand(size, *shape)


def time_dtype(model: Model) -> torch.dtype:
    """What is denoised in."""
    return model.precision.time or next(model.parameters()).dtype


def schedule(config: PolicyConfig, model: Model, shift: float | None = None) -> fast_sampling.Schedule:
    """The steps of the sampler, those of the video if no `shift` is given."""
    dtype, device = time_dtype(model), next(model.parameters()).device
    return fast_sampling.Schedule(
        *flow_matching.schedule(config.sampling.steps, shift or config.sampling.video_shift, dtype=dtype, device=device)
    )


def _future_noise(model: Model, first: Tensor, frames: int, wish: Wish, pool: int = 1) -> Tensor:
    """Initial noise of the frames after the observed one, on the grid of `first`, pooled."""
    channels, _, height, width = first.shape[1:]
    noise = wish.noise_video((channels, frames, height // pool, width // pool))
    return noise[:, :, 1:].to(first.device, time_dtype(model))


def _denoise(
    config: PolicyConfig, model: FastWAM, first: Tensor, context: Tensor, frames: int, wish: Wish, mode: ActionMode
) -> tuple[Tensor, Tensor | None]:
    """A Fast-WAM's chunks and future."""
    actions = wish.noise((wish.horizon, config.action.layout.dim)).to(first.device, time_dtype(model))
    wants_video = wish.imagine or mode != "first_frame"
    actions, future = fast_sampling.draw(
        model,
        first,
        context,
        actions,
        _future_noise(model, first, frames, wish) if wants_video else None,
        mode=mode,
        action_schedule=schedule(config, model, config.sampling.action_shift),
        video_schedule=schedule(config, model),
        read_video=wish.imagine,
        known=None if wish.known is None else fast_sampling.Known(*(x.to(actions) for x in wish.known)),
    )
    return actions, torch.cat((first, future.to(first.dtype)), dim=2) if wish.imagine and future is not None else None
