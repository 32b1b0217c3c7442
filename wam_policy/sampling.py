"""Samples action chunks, and the latents of future frames, from a model of either family.

This module dispatches to `models.fast_wam.sampling` and `models.light_wam.sampling`. It turns
noise, an action target and encoded observations into normalised actions; observations are read, and
actions denormalised, in `wam_policy.pipeline`. See docs/method.md, "Sampling".
"""

# B batch, C latent channels, F latent frames, h w latent grid,
# L prompt rows, T actions in a chunk, A numbers per action

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
from wam_policy.utils.arrays import as_array

# PyTorch takes seeds from -_SEEDS to _SEEDS - 1.
_SEEDS = 2**63

NoiseSource = Callable[[tuple[int, ...]], Tensor]
"""Returns initial noise [B, *shape] for the shape of one sample."""


class ActionTarget(NamedTuple):
    """Actions that a chunk has to continue, such as those executed while it is computed."""

    actions: np.ndarray  # [T, A] or [B, T, A], in the policy's units
    # [T] or [B, T]: 1 fixes an action, 0 leaves it free, values between pull towards the target.
    weights: np.ndarray


class SampleRequest(NamedTuple):
    """What to sample for one batch of observations."""

    horizon: int  # actions per chunk
    noise: NoiseSource  # initial noise of the actions
    noise_video: NoiseSource  # initial noise of the video latents
    mode: ActionMode | None = None  # what the actions attend to; None takes the config's mode
    imagine: bool = False  # also sample the latents of the future frames
    action_target: fast_sampling.NormalizedTarget | None = None  # on the CPU


@torch.no_grad()
def sample_actions(
    config: PolicyConfig,
    model: Model,
    first_frame: Tensor,
    context: Tensor,
    frames: int,
    request: SampleRequest,
) -> tuple[Tensor, Tensor | None]:
    """Sample action chunks and, if requested, the latents of the clips that begin with the observed
    frames.

    Args:
        config: Config of the policy.
        model: Model of the policy.
        first_frame: [B, C, 1, h, w] latents of the observed frames.
        context: [B, L + 1, text_dim], or [B, L, text_dim] without state, from `model.context()`.
        frames: Latent frames of a clip, F.
        request: What to sample.

    Returns:
        [B, T, A] normalised actions, and [B, C, F, h, w] latents, or None if they were not
        requested. The latents of a Light-WAM lie on its pooled grid.

    Raises:
        ConfigError: The variant was not trained for the requested mode, or the model cannot
            imagine.
    """
    mode = config.action_mode(request.mode)
    if isinstance(model, FastWAM):
        return _sample_fast(config, model, first_frame, context, frames, request, mode)
    return _sample_light(config, model, first_frame, context, frames, request)


def _sample_fast(
    config: PolicyConfig,
    model: FastWAM,
    first_frame: Tensor,
    context: Tensor,
    frames: int,
    request: SampleRequest,
    mode: ActionMode,
) -> tuple[Tensor, Tensor | None]:
    """Denoise the chunks of a Fast-WAM and, where the mode or the caller needs them, its future
    frames.
    """
    dtype = sampling_dtype(model)
    noise = request.noise((request.horizon, config.action.layout.dim))
    noise = noise.to(first_frame.device, dtype)

    # Frames are denoised only where the actions attend to them or the caller asks for them.
    future = None
    if request.imagine or mode != "first_frame":
        future = _future_noise(model, first_frame, frames, request)

    target = None
    if request.action_target is not None:
        target = fast_sampling.NormalizedTarget(*(x.to(noise) for x in request.action_target))

    actions, future = fast_sampling.prefill_and_denoise(
        model,
        first_frame,
        context,
        noise,
        future,
        mode=mode,
        action_schedule=sampler_schedule(config, model, config.sampling.action_shift),
        video_schedule=sampler_schedule(config, model),
        decode_video=request.imagine,
        target=target,
    )
    if future is None or not request.imagine:
        return actions, None
    return actions, torch.cat((first_frame, future.to(first_frame.dtype)), dim=2)


def _sample_light(
    config: PolicyConfig,
    model: LightWAM,
    first_frame: Tensor,
    context: Tensor,
    frames: int,
    request: SampleRequest,
) -> tuple[Tensor, Tensor | None]:
    """Regress the chunks of a Light-WAM in one pass; denoise its future frames if requested."""
    actions = model.predict_actions(first_frame, context, request.horizon)
    actions = blend_target(actions, request.action_target)
    if not request.imagine:
        return actions, None

    # The second pass learned the future on a pooled latent grid, so that is where it is denoised.
    check_can_imagine(model)
    noise = _future_noise(model, first_frame, frames, request, model.config.video_pool)
    text = model.video.embed_text(context)
    schedule = sampler_schedule(config, model)
    return actions, light_sampling.imagine(model, first_frame, text, noise, schedule)


def check_can_imagine(model: Model) -> None:
    """Check that a model can predict future frames.

    Raises:
        ConfigError: It is a lean Light-WAM, which has no video head.
    """
    if isinstance(model, LightWAM) and model.config.lean_steps is not None:
        raise ConfigError(
            "a lean checkpoint holds only what acting needs and has no video head; "
            "load the fat or the slim checkpoint to imagine"
        )


def normalize_target(
    target: ActionTarget | None, normalization: Normalization, shape: tuple[int, int, int]
) -> fast_sampling.NormalizedTarget | None:
    """Normalise an action target and expand it to the chunks of a batch.

    Args:
        target: Actions in the policy's units, with their weights.
        normalization: Normalisation of the policy's actions.
        shape: Shape [B, T, A] of the chunks.

    Raises:
        ObservationError: The target has another shape, is not finite, or a weight lies outside [0,
            1].
    """
    if target is None:
        return None

    actions = _as_float32(target.actions, "action target")
    weights = _as_float32(target.weights, "weights of the action target")
    if actions.shape not in (shape, shape[1:]) or weights.shape not in (shape[:2], shape[1:2]):
        raise ObservationError(
            f"action target: expected actions {list(shape)} and weights {list(shape[:2])}, "
            f"got {list(actions.shape)} and {list(weights.shape)}"
        )
    if not np.isfinite(actions).all():
        raise ObservationError("action target: every action must be finite")
    if not ((weights >= 0).all() and (weights <= 1).all()):
        raise ObservationError("action target: every weight must lie in [0, 1]")

    normalized = torch.from_numpy(normalization.normalize(actions)).expand(shape)
    expanded_weights = torch.from_numpy(weights).expand(shape[:2]).unsqueeze(-1)
    return fast_sampling.NormalizedTarget(normalized, expanded_weights)


def blend_target(actions: Tensor, target: fast_sampling.NormalizedTarget | None) -> Tensor:
    """Interpolate one-pass actions [B, T, A] towards a target by its weights."""
    if target is None:
        return actions
    return torch.lerp(actions, target.actions.to(actions), target.weights.to(actions))


def initial_noise(
    size: int,
    shape: tuple[int, ...],
    noise: np.ndarray | Tensor | None,
    generator: torch.Generator,
    *,
    fixed_seed: int | None,
    seeds: Sequence[int] | None = None,
) -> Tensor:
    """Return initial noise [B, *shape], float32 on the CPU so that every device starts from the
    same numbers.

    Args:
        size: Number of samples, B.
        shape: Shape of one sample.
        noise: Noise of the caller, [*shape] or [B, *shape]; takes precedence over everything else.
        generator: Source of new noise.
        fixed_seed: Seed of one noise that all samples share; None draws new noise for each sample.
        seeds: One seed per sample; takes precedence over `fixed_seed`.

    Raises:
        ObservationError: `noise` has another shape, or the number of seeds is not B.
    """
    # 1. Noise of the caller.
    if noise is not None:
        array = _as_float32(noise, "noise")
        if array.shape not in (shape, (size, *shape)):
            raise ObservationError(
                f"noise: expected {list(shape)} or {[size, *shape]}, got {list(array.shape)}"
            )
        if not np.isfinite(array).all():
            raise ObservationError("noise: every number must be finite")
        return torch.from_numpy(array).expand(size, *shape)

    # 2. One seed per sample: a sample's noise then does not depend on the rest of the batch.
    if seeds is not None:
        if len(seeds) != size:
            raise ObservationError(
                f"seeds: expected one for each of {size} observations, got {len(seeds)}"
            )
        return torch.stack([_seeded_noise(shape, int(seed)) for seed in seeds])

    # 3. One noise for all samples, or new noise for each.
    if fixed_seed is not None:
        return _seeded_noise(shape, fixed_seed).expand(size, *shape)
    return torch.stack([_draw_noise(shape, generator) for _ in range(size)])


def _as_float32(value: object, what: str) -> np.ndarray:
    """Return numbers of the caller as a contiguous array, float32."""
    array = as_array(value, what, ObservationError)
    if array.dtype.kind not in "fiu":
        raise ObservationError(f"{what}: expected numbers, got {array.dtype}")
    return np.ascontiguousarray(array, np.float32)


def _seeded_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Return the noise of a seed, float32 on the CPU."""
    if not -_SEEDS <= seed < _SEEDS:
        raise ObservationError(f"seeds: expected integers of 64 bits, got {seed}")
    return _draw_noise(shape, torch.Generator("cpu").manual_seed(seed))


def _draw_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return new noise, float32 on the CPU whatever PyTorch's defaults are."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def sampling_dtype(model: Model) -> torch.dtype:
    """Return the dtype in which actions and frames are denoised."""
    return model.precision.time or next(model.parameters()).dtype


def sampler_schedule(
    config: PolicyConfig, model: Model, shift: float | None = None
) -> fast_sampling.Schedule:
    """Return the timesteps and step sizes of the sampler.

    Args:
        config: Config of the policy.
        model: Model of the policy; gives device and dtype.
        shift: Shift of the schedule; None takes the config's shift for video.
    """
    timesteps, deltas = flow_matching.make_schedule(
        config.sampling.steps,
        shift or config.sampling.video_shift,
        dtype=sampling_dtype(model),
        device=next(model.parameters()).device,
    )
    return fast_sampling.Schedule(timesteps, deltas)


def _future_noise(
    model: Model, first_frame: Tensor, frames: int, request: SampleRequest, pool: int = 1
) -> Tensor:
    """Return initial noise of the frames after the observed one, on the latent grid divided by
    `pool`.
    """
    channels, _, height, width = first_frame.shape[1:]
    # Noise is drawn for the whole clip: the reference draws the observed frame's too and drops it.
    noise = request.noise_video((channels, frames, height // pool, width // pool))
    return noise[:, :, 1:].to(first_frame.device, sampling_dtype(model))
