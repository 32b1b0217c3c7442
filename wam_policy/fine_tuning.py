"""One training step of a policy inside somebody's own loop: a batch in the robot's units in, a loss out."""

# B batch, F pixel frames of a clip, H W pixels, T actions in a chunk, A numbers per action, P numbers of state

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from wam_policy import images
from wam_policy import observation as observations
from wam_policy.errors import ConfigError, DatasetError
from wam_policy.models.fast_wam.loss import Batch, LossConfig, latent_padding
from wam_policy.models.fast_wam.model import FastWAM
from wam_policy.models.light_wam.loss import LightLossConfig
from wam_policy.models.light_wam.model import LightWAM, is_trainable
from wam_policy.models.registry import AnyLossConfig, compute_losses, sample_noise

if TYPE_CHECKING:
    from wam_policy.policy import WAMPolicy


def trainable_parameters(policy: WAMPolicy) -> list[Tensor]:
    """The weights that a policy's family trains and that aren't frozen; a Light-WAM's trunk is frozen here.

    Raises:
        ConfigError: a lean Light-WAM, which only acts.
    """
    if isinstance(policy.model, LightWAM):
        if policy.model.config.lean_steps is not None:
            raise ConfigError("a lean checkpoint only acts: train the fat or slim one")
        for name, parameter in policy.model.named_parameters():
            if not is_trainable(name):
                parameter.requires_grad_(False)
    if policy.dtype != torch.float32:
        warnings.warn(
            f"weights of {policy.dtype} lose small updates: train `from_pretrained(…, dtype=torch.float32)`",
            stacklevel=3,
        )
    return [parameter for parameter in policy.model.parameters() if parameter.requires_grad]


@torch.no_grad()
def encode_batch(policy: WAMPolicy, batch: Mapping[str, Any]) -> Batch:
    """Normalise a batch and encode its clips and prompts.

    Args:
        policy: whose contract it is.
        batch: see `WAMPolicy.training_step`.

    Raises:
        DatasetError: actions, clips or padding have other shapes than the contract's, or aren't finite.
        ObservationError: cameras or state don't fit the contract.
        PromptError: an instruction can't be embedded.
    """
    config = policy.config
    frames, horizon, dim = config.video.frames, config.action.horizon, config.action.layout.dim
    clips = {
        name: np.asarray(batch[observations.IMAGE + name])
        for name in config.cameras.names
        if _has(batch, name)
    }
    for name, clip in clips.items():
        if clip.ndim != 5 or clip.shape[1] != frames:
            raise DatasetError(
                f"camera {name!r}: expected clips [B, {frames}, H, W, 3], got {list(clip.shape)}"
            )
    first = {observations.IMAGE + name: clip[:, 0] for name, clip in clips.items()}
    state = config.state
    names = None if state is None else state.names
    seen = observations.check_observation({**batch, **first}, config.cameras.names, names)
    size = len(seen)
    action = _floats(batch, "action", (size, horizon, dim))
    action_is_pad = _flags(batch, "action_is_pad", (size, horizon))
    frame_is_pad = _flags(batch, "frame_is_pad", (size, frames))
    flat = {name: clip.reshape(-1, *clip.shape[2:]) for name, clip in clips.items()}
    canvas = (
        torch.from_numpy(images.canvas(flat, config.cameras))
        .unflatten(0, (size, frames))
        .transpose(1, 2)
    )
    device, dtype = policy.device, policy.dtype
    normalised = torch.from_numpy(config.action.normalization.normalize(action))
    prompts = [config.prompt.prompt(instruction) for instruction in seen.instructions]
    proprio = None
    if state is not None and seen.state is not None:
        proprio = torch.from_numpy(state.normalization.normalize(seen.state)).to(device, dtype)
    return Batch(
        policy.vae.encode(canvas.to(device, dtype)),
        policy.prompts.embed(prompts, device=device, dtype=dtype),
        normalised.to(device, dtype),
        proprio,
        torch.from_numpy(action_is_pad).to(device),
        latent_padding(torch.from_numpy(frame_is_pad), policy.vae.temporal_ratio).to(device),
    )


def training_step(
    policy: WAMPolicy,
    batch: Mapping[str, Any] | Batch,
    loss: AnyLossConfig | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """See `WAMPolicy.training_step`."""
    encoded = batch if isinstance(batch, Batch) else encode_batch(policy, batch)
    model, sampling, variant = policy.model, policy.config.sampling, policy.config.variant
    usual: AnyLossConfig
    if isinstance(model, FastWAM):
        usual = LossConfig(video_shift=sampling.video_shift, action_shift=sampling.action_shift)
    else:
        usual = LightLossConfig(
            video_shift=sampling.video_shift, prefix_steps=policy.config.action.supervised_steps
        )
    losses = compute_losses(
        model, encoded, sample_noise(model, encoded, generator, variant), loss or usual, variant
    )
    return losses.total, {"video": losses.video.detach(), "action": losses.action.detach()}


def _has(batch: Mapping[str, Any], camera: str) -> bool:
    return observations.IMAGE + camera in batch  # what is missing is named by `observation.check`


def _floats(batch: Mapping[str, Any], key: str, shape: Sequence[int]) -> np.ndarray:
    found = np.asarray(batch.get(key, ()), np.float32)
    if found.shape != tuple(shape):
        raise DatasetError(f"{key!r}: expected {list(shape)}, got {list(found.shape)}")
    if not np.isfinite(found).all():
        raise DatasetError(
            f"{key!r} isn't finite in sample {int(np.flatnonzero(~np.isfinite(found).all((1, 2)))[0])}"
        )
    return found


def _flags(batch: Mapping[str, Any], key: str, shape: Sequence[int]) -> np.ndarray:
    found = np.asarray(batch.get(key, np.zeros(shape, bool)))
    if found.shape != tuple(shape) or found.dtype != bool:
        raise DatasetError(
            f"{key!r}: expected bool {list(shape)}, got {found.dtype} {list(found.shape)}"
        )
    return found
