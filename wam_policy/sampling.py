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


class ModelInput(NamedTuple):
    """A batch of observations as a model takes them."""

    canvas: np.ndarray  # float32 [B, 3, H, W] in [-1, 1]
    proprio: np.ndarray | None  # float32 [B, P], normalised
    prompts: Sequence[str]
    starts: np.ndarray  # bool [B], where an episode begins


class ActionTarget(NamedTuple):
    """Actions that are known before a chunk is predicted, as those are that will have been played when it is there."""

    actions: np.ndarray  # [T, A] or [B, T, A], in the policy's units
    weights: np.ndarray  # [T] or [B, T]: 1 where an action is fixed, 0 where it is free; between, it is drawn towards it


class SampleRequest(NamedTuple):
    """What a caller wants of a model."""

    horizon: int  # actions per chunk
    noise: Noise  # of the actions
    noise_video: Noise
    mode: ActionMode | None = None  # None: the contract's
    imagine: bool = False  # the future's latents too
    action_target: fast_sampling.NormalizedTarget | None = None  # of the actions, on the CPU


@torch.no_grad()
def sample_actions(
    config: PolicyConfig,
    model: Model,
    first_frame: Tensor,
    context: Tensor,
    frames: int,
    request: SampleRequest,
) -> tuple[Tensor, Tensor | None]:
    """Chunks, and latents of the clips that begin with the observed frames.

    Args:
        config: the policy's contract.
        model: its model.
        first_frame: [B, C, 1, h, w] latents of the observed frames.
        context: [B, L + 1, text_dim], from `model.context()`.
        frames: latent frames of a clip.
        request: what is wanted.

    Returns:
        [B, T, A] normalised actions, and [B, C, F, h, w] (None if not wanted); a Light-WAM imagines on its pooled grid.

    Raises:
        ConfigError: the model can't do it.
    """
    mode = config.action_mode(request.mode)
    if isinstance(model, FastWAM):
        return _denoise(config, model, first_frame, context, frames, request, mode)
    actions = blend_target(
        model.predict_actions(first_frame, context, request.horizon), request.action_target
    )
    if not request.imagine:
        return actions, None
    check_can_imagine(model)
    future, text = (
        _future_noise(model, first_frame, frames, request, model.config.video_pool),
        model.video.embed_text(context),
    )
    return actions, light_sampling.imagine(
        model, first_frame, text, future, sampler_schedule(config, model)
    )


def check_can_imagine(model: Model) -> None:
    """Refuse a model that can't imagine.

    Raises:
        ConfigError: it is a lean one.
    """
    if isinstance(model, LightWAM) and model.config.lean_steps is not None:
        raise ConfigError(
            "a lean checkpoint only acts: its video head is gone; load the fat or slim one to imagine"
        )


def normalize_target(
    target: ActionTarget | None, normalization: Normalization, shape: tuple[int, int, int]
) -> fast_sampling.NormalizedTarget | None:
    """Known actions of a batch, normalised, for chunks of a shape [B, T, A].

    Raises:
        ObservationError: they have another shape, or weights that aren't weights.
    """
    if target is None:
        return None
    actions, weights = (
        np.asarray(target.actions, np.float32),
        np.asarray(target.weights, np.float32),
    )
    if actions.shape not in (shape, shape[1:]) or weights.shape not in (shape[:2], shape[1:2]):
        raise ObservationError(
            f"known actions: expected {list(shape)} and weights {list(shape[:2])}, got {list(actions.shape)} and "
            f"{list(weights.shape)}"
        )
    if not (np.isfinite(actions).all() and (weights >= 0).all() and (weights <= 1).all()):
        raise ObservationError("known actions must be finite and their weights between 0 and 1")
    normalised = torch.from_numpy(normalization.normalize(actions)).expand(shape)
    return fast_sampling.NormalizedTarget(
        normalised, torch.from_numpy(weights).expand(shape[:2]).unsqueeze(-1)
    )


def blend_target(actions: Tensor, target: fast_sampling.NormalizedTarget | None) -> Tensor:
    """Actions [B, T, A] of a model that is asked once, mixed with what is known of them."""
    return actions if target is None else torch.lerp(actions, *(x.to(actions) for x in target))


def initial_noise(
    size: int,
    shape: tuple[int, ...],
    noise: np.ndarray | Tensor | None,
    generator: torch.Generator,
    *,
    fixed_seed: int | None,
    seeds: Sequence[int] | None = None,
) -> Tensor:
    """Initial noise [B, *shape], drawn in float32 on the CPU so that every device starts from the same.

    Args:
        size: B.
        shape: of one sample.
        noise: the caller's own, [*shape] or [B, *shape].
        generator: what new noise is drawn from.
        fixed_seed: the seed of one noise for all samples; None: new noise for each.
        seeds: a seed for each sample, in its place.

    Raises:
        ObservationError: the caller's has another shape, or there are more or fewer seeds than samples.
    """
    if noise is None and seeds is not None:
        if len(seeds) != size:
            raise ObservationError(
                f"seeds: expected one for each of {size} observations, got {len(seeds)}"
            )
        return torch.stack(
            [
                torch.randn(shape, generator=torch.Generator().manual_seed(int(seed)))
                for seed in seeds
            ]
        )
    if noise is not None:
        noise = torch.as_tensor(noise, dtype=torch.float32)
        if noise.shape not in (shape, (size, *shape)):
            raise ObservationError(
                f"noise: expected {list(shape)} or {[size, *shape]}, got {list(noise.shape)}"
            )
        return noise.expand(size, *shape)
    if fixed_seed is None:
        return torch.stack([torch.randn(shape, generator=generator) for _ in range(size)])
    return torch.randn(shape, generator=torch.Generator().manual_seed(fixed_seed)).expand(
        size, *shape
    )


def sampling_dtype(model: Model) -> torch.dtype:
    """What is denoised in."""
    return model.precision.time or next(model.parameters()).dtype


def sampler_schedule(
    config: PolicyConfig, model: Model, shift: float | None = None
) -> fast_sampling.Schedule:
    """The steps of the sampler, those of the video if no `shift` is given."""
    dtype, device = sampling_dtype(model), next(model.parameters()).device
    return fast_sampling.Schedule(
        *flow_matching.make_schedule(
            config.sampling.steps, shift or config.sampling.video_shift, dtype=dtype, device=device
        )
    )


def _future_noise(
    model: Model, first: Tensor, frames: int, wish: SampleRequest, pool: int = 1
) -> Tensor:
    """Initial noise of the frames after the observed one, on the grid of `first`, pooled."""
    channels, _, height, width = first.shape[1:]
    noise = wish.noise_video((channels, frames, height // pool, width // pool))
    return noise[:, :, 1:].to(first.device, sampling_dtype(model))


def _denoise(
    config: PolicyConfig,
    model: FastWAM,
    first: Tensor,
    context: Tensor,
    frames: int,
    wish: SampleRequest,
    mode: ActionMode,
) -> tuple[Tensor, Tensor | None]:
    """A Fast-WAM's chunks and future."""
    actions = wish.noise((wish.horizon, config.action.layout.dim)).to(
        first.device, sampling_dtype(model)
    )
    wants_video = wish.imagine or mode != "first_frame"
    actions, future = fast_sampling.prefill_and_denoise(
        model,
        first,
        context,
        actions,
        _future_noise(model, first, frames, wish) if wants_video else None,
        mode=mode,
        action_schedule=sampler_schedule(config, model, config.sampling.action_shift),
        video_schedule=sampler_schedule(config, model),
        decode_video=wish.imagine,
        target=None
        if wish.action_target is None
        else fast_sampling.NormalizedTarget(*(x.to(actions) for x in wish.action_target)),
    )
    return actions, torch.cat(
        (first, future.to(first.dtype)), dim=2
    ) if wish.imagine and future is not None else None
