"""One step of a custom training loop: a batch in the robot's units in, a loss out."""

# B batch, F pixel frames of a clip, H W pixels, T actions in a chunk, A numbers per action, P
# numbers of state

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wam_policy import images, pipeline
from wam_policy.config import PolicyConfig
from wam_policy.errors import ConfigError, DatasetError
from wam_policy.models.fast_wam.loss import Batch, LossConfig, latent_padding
from wam_policy.models.fast_wam.model import FastWAM
from wam_policy.models.light_wam.loss import LightLossConfig
from wam_policy.models.light_wam.model import LightWAM, is_trainable
from wam_policy.models.registry import AnyLossConfig, compute_losses, sample_noise
from wam_policy.observation import IMAGE
from wam_policy.pipeline import PolicyLike
from wam_policy.utils.arrays import as_array


def trainable_parameters(policy: PolicyLike) -> list[Tensor]:
    """Return the weights that the policy's family trains; the frozen video expert of a Light-WAM is
    frozen here.

    Raises:
        ConfigError: The policy is a lean Light-WAM, which only acts.
    """
    if isinstance(policy.model, LightWAM):
        if policy.model.config.lean_steps is not None:
            raise ConfigError("a lean checkpoint only acts: train the fat or the slim one")
        for name, parameter in policy.model.named_parameters():
            if not is_trainable(name):
                parameter.requires_grad_(False)

    if policy.dtype != torch.float32:
        warnings.warn(
            f"weights of {policy.dtype} lose small updates: "
            f"load the policy to train by `from_pretrained(…, dtype=torch.float32)`",
            stacklevel=3,
        )
    return [parameter for parameter in policy.model.parameters() if parameter.requires_grad]


def training_step(
    policy: PolicyLike,
    batch: Mapping[str, Any] | Batch,
    loss: AnyLossConfig | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of a batch and its parts; see `WAMPolicy.training_step`."""
    encoded = batch if isinstance(batch, Batch) else encode_batch(policy, batch)
    config = policy.config
    noise = sample_noise(policy.model, encoded, generator, config.variant)
    losses = compute_losses(
        policy.model, encoded, noise, loss or default_loss(policy), config.variant
    )
    return losses.total, {"video": losses.video.detach(), "action": losses.action.detach()}


def default_loss(policy: PolicyLike) -> AnyLossConfig:
    """Return the loss of the policy's family with the shifts of its config."""
    sampling = policy.config.sampling
    if isinstance(policy.model, FastWAM):
        return LossConfig(video_shift=sampling.video_shift, action_shift=sampling.action_shift)
    return LightLossConfig(
        video_shift=sampling.video_shift, prefix_steps=policy.config.action.supervised_steps
    )


@torch.no_grad()
def encode_batch(policy: PolicyLike, batch: Mapping[str, Any]) -> Batch:
    """Normalise a batch and encode its clips and prompts.

    Args:
        policy: Policy whose config the batch has to fit.
        batch: See `WAMPolicy.training_step`.

    Raises:
        DatasetError: Actions, clips or padding have another shape than the config's, or are not
            finite.
        ObservationError: Cameras or state do not fit the config.
        PromptError: An instruction cannot be embedded.
    """
    config = policy.config
    device = policy.device
    dtype = policy.dtype
    frames = config.video.frames
    horizon = config.action.horizon

    # The first frame of every clip is the observation, which the pipeline checks.
    clips = _clips(config, batch)
    first_frames = {IMAGE + name: clip[:, 0] for name, clip in clips.items()}
    observation = pipeline.read_observation(config, {**batch, **first_frames})
    size = len(observation)

    # The other inputs, checked against the shapes of the config.
    action = _floats(batch, "action", (size, horizon, config.action.layout.dim))
    action_is_pad = _flags(batch, "action_is_pad", (size, horizon))
    frame_is_pad = _flags(batch, "frame_is_pad", (size, frames))

    # Frames of all clips are composed at once, then regrouped as [B, 3, F, H, W].
    flat = {name: clip.reshape(-1, *clip.shape[2:]) for name, clip in clips.items()}
    canvas = torch.from_numpy(images.canvas(flat, config.cameras))
    video = canvas.unflatten(0, (size, frames)).transpose(1, 2)

    proprio = None
    normalized_state = pipeline.prepare_proprio(config, observation)
    if normalized_state is not None:
        proprio = torch.from_numpy(normalized_state).to(device, dtype)
    prompts = pipeline.prepare_prompts(config, observation)
    normalized = torch.from_numpy(config.action.normalization.normalize(action))
    latent_is_pad = latent_padding(torch.from_numpy(frame_is_pad), policy.vae.temporal_ratio)
    return Batch(
        latents=policy.vae.encode(video.to(device, dtype)),
        context=policy.prompts.embed(prompts, device=device, dtype=dtype),
        action=normalized.to(device, dtype),
        proprio=proprio,
        action_is_pad=torch.from_numpy(action_is_pad).to(device),
        latent_is_pad=latent_is_pad.to(device),
    )


def _clips(config: PolicyConfig, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the clips [B, F, H, W, 3] of the cameras that are present; the observation check names
    missing ones.
    """
    clips = {}
    for name in config.cameras.names:
        if IMAGE + name not in batch:
            continue
        clip = as_array(batch[IMAGE + name], f"camera {name!r}", DatasetError)
        if clip.ndim != 5 or clip.shape[1] != config.video.frames:
            raise DatasetError(
                f"camera {name!r}: expected clips [B, {config.video.frames}, H, W, 3], "
                f"got {list(clip.shape)}"
            )
        clips[name] = clip
    return clips


def _floats(batch: Mapping[str, Any], key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return an entry of the batch as float32, checked to have this shape and to be finite."""
    values = as_array(batch.get(key, ()), repr(key), DatasetError)
    if values.dtype.kind not in "fiu":
        raise DatasetError(f"{key!r}: expected numbers, got {values.dtype}")
    values = values.astype(np.float32)
    if values.shape != shape:
        raise DatasetError(f"{key!r}: expected {list(shape)}, got {list(values.shape)}")
    finite = np.isfinite(values).all((1, 2))
    if not finite.all():
        sample = int(np.flatnonzero(~finite)[0])
        raise DatasetError(f"{key!r} is not finite in sample {sample}")
    return values


def _flags(batch: Mapping[str, Any], key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return an entry of the batch as bool, checked to have this shape; False everywhere if it is
    absent.
    """
    values = as_array(batch.get(key, np.zeros(shape, bool)), repr(key), DatasetError)
    if values.shape != shape or values.dtype != bool:
        raise DatasetError(
            f"{key!r}: expected bool {list(shape)}, got {values.dtype} {list(values.shape)}"
        )
    return values
