"""The way from an observation to actions, as pure functions over the parts of a policy.

    observation -> ModelInput -> EncodedObservation -> normalised actions -> actions

`WAMPolicy`, the compiled inference, fine-tuning, validation and the benchmarks all take this way,
so that an observation is prepared, and an action read, in one place only.
"""

# B batch, H W pixels, P proprioception size, C latent channels, F latent frames,
# h w latent grid, L prompt rows, T actions in a chunk, A numbers per action

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from wam_policy import images, sampling
from wam_policy.action_queue import ActionQueue
from wam_policy.config import PolicyConfig
from wam_policy.errors import ConfigError, WeightsError
from wam_policy.models.encoders.text import PromptEmbeddings
from wam_policy.models.encoders.vae import VAE
from wam_policy.models.fast_wam.variants import ActionMode
from wam_policy.models.light_wam.model import LightWAM
from wam_policy.models.registry import Model
from wam_policy.observation import Observation, check_observation
from wam_policy.sampling import ActionTarget, SampleRequest


class ModelInput(NamedTuple):
    """A batch of observations in the form a model takes."""

    canvas: np.ndarray  # float32 [B, 3, H, W] in [-1, 1]: the cameras composed into one image
    proprio: np.ndarray | None  # float32 [B, P], normalised
    prompts: Sequence[str]  # B prompts
    episode_start: np.ndarray  # bool [B]


class EncodedObservation(NamedTuple):
    """A batch of observations, encoded as inputs of the experts."""

    latents: Tensor  # [B, C, 1, h, w] of the canvas
    # [B, L + 1, text_dim], prompt embeddings and the proprioception token; [B, L, text_dim] without
    # state.
    context: Tensor


class ChunkEngine(Protocol):
    """A compiled forward pass, as `wam_policy.inference` builds it."""

    @property
    def horizon(self) -> int:
        """Actions per chunk it was compiled for."""

    def __call__(self, inputs: ModelInput, request: SampleRequest) -> Tensor:
        """Return normalised actions [B, T, A], float32 on the CPU."""


class PolicyLike(Protocol):
    """The parts of a policy that this module works on; `WAMPolicy` has them."""

    @property
    def config(self) -> PolicyConfig:
        """Config of the policy."""

    @property
    def model(self) -> Model:
        """Model on its device and in its dtype."""

    @property
    def prompts(self) -> PromptEmbeddings:
        """Prompt embeddings, with or without a text encoder behind them."""

    @property
    def vae(self) -> VAE:
        """Video codec."""

    @property
    def engine(self) -> ChunkEngine | None:
        """Compiled forward pass; None if the policy is not compiled."""

    @property
    def device(self) -> torch.device:
        """Device of the model."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the model."""


# -- observation -> model input --------------------------------------------------------------------


def read_observation(
    config: PolicyConfig, observation: Any, instruction: str | None = None
) -> Observation:
    """Check an observation, single or batched, against what a policy needs.

    Args:
        config: Config of the policy.
        observation: See `wam_policy.observation`.
        instruction: Instruction of an observation that holds none.

    Raises:
        ObservationError: Something is missing, has another type or shape, or is not finite.
    """
    state_names = None if config.state is None else config.state.names
    return check_observation(observation, config.cameras.names, state_names, instruction)


def select_observations(observation: Observation, mask: np.ndarray) -> Observation:
    """Return the observations of a batch where `mask`, bool [B], is true."""
    pairs = zip(observation.instructions, mask, strict=True)
    return dataclasses.replace(
        observation,
        images={name: batch[mask] for name, batch in observation.images.items()},
        state=None if observation.state is None else observation.state[mask],
        instructions=tuple(instruction for instruction, selected in pairs if selected),
        episode_start=observation.episode_start[mask],
    )


def prepare_input(config: PolicyConfig, observation: Observation) -> ModelInput:
    """Compose the canvas, normalise the state and build the prompts of checked observations.

    Raises:
        ObservationError: An image has another size than the config allows.
    """
    return ModelInput(
        canvas=images.canvas(observation.images, config.cameras),
        proprio=prepare_proprio(config, observation),
        prompts=prepare_prompts(config, observation),
        episode_start=observation.episode_start,
    )


def prepare_proprio(config: PolicyConfig, observation: Observation) -> np.ndarray | None:
    """Return the normalised state, float32 [B, P]; None for a policy that reads no state."""
    if config.state is None or observation.state is None:
        return None
    return config.state.normalization.normalize(observation.state)


def prepare_prompts(config: PolicyConfig, observation: Observation) -> list[str]:
    """Return the prompts of the instructions, one per observation."""
    return [config.prompt.prompt(text) for text in observation.instructions]


# -- model input -> normalised actions -------------------------------------------------------------


@torch.no_grad()
def encode_observation(policy: PolicyLike, inputs: ModelInput) -> EncodedObservation:
    """Encode the canvas by the video codec, and embed prompt and proprioception.

    Raises:
        PromptError: A prompt has no embedding and there is no text encoder.
    """
    device = policy.device
    dtype = policy.dtype

    # The proprioception is one more row behind the rows of the prompt.
    proprio = None
    if inputs.proprio is not None:
        proprio = torch.from_numpy(inputs.proprio).to(device, dtype)

    prompts = policy.prompts.embed(inputs.prompts, device=device, dtype=dtype)
    context = policy.model.context(prompts, proprio)
    canvas = torch.from_numpy(inputs.canvas).to(device, dtype)
    return EncodedObservation(policy.vae.encode_first_frame(canvas), context)


def sample_encoded(
    policy: PolicyLike, encoded: EncodedObservation, request: SampleRequest
) -> tuple[Tensor, Tensor | None]:
    """Sample normalised actions [B, T, A] and, if requested, latents [B, C, F, h, w], without the
    engine.

    Raises:
        ConfigError: The variant was not trained for the requested mode, or the model cannot
            imagine.
    """
    frames = latent_frames(policy.config, policy.vae)
    return sampling.sample_actions(
        policy.config, policy.model, encoded.latents, encoded.context, frames, request
    )


def sample(
    policy: PolicyLike, inputs: ModelInput, request: SampleRequest
) -> tuple[Tensor, Tensor | None]:
    """Sample normalised actions [B, T, A] and, if requested, latents [B, C, F, h, w].

    The compiled engine is used where the policy has one; it does not imagine.
    """
    # A compiled engine holds only what acting needs.
    if policy.engine is not None and not request.imagine:
        return policy.engine(inputs, request), None
    return sample_encoded(policy, encode_observation(policy, inputs), request)


def make_request(
    policy: PolicyLike,
    size: int,
    *,
    noise: np.ndarray | Tensor | None = None,
    noise_video: np.ndarray | Tensor | None = None,
    seeds: Sequence[int] | None = None,
    action_target: ActionTarget | None = None,
    mode: ActionMode | None = None,
    horizon: int | None = None,
    generator: torch.Generator | None = None,
    imagine: bool = False,
) -> SampleRequest:
    """Build the sample request of a batch; what is not given is the config's.

    Args:
        policy: Policy that will be sampled.
        size: Number of observations, B.
        noise: Initial noise [T, A] or [B, T, A] of the actions.
        noise_video: Initial noise [C, F, h, w] or [B, C, F, h, w] of the video latents.
        seeds: One seed per observation to draw its noise from.
        action_target: Actions to continue, in the policy's units.
        mode: What the actions attend to.
        horizon: Actions per chunk.
        generator: Source of new noise for every sample; None draws the noise the config fixes by
            its seed.
        imagine: Also sample the future frames.

    Raises:
        ConfigError: The horizon is not possible.
        ObservationError: The action target does not fit. Noise and seeds are checked when the noise
            is drawn.
    """
    config = policy.config
    length = chunk_length(policy, horizon)

    # Without a generator every sample and every call starts from the same noise, as the references
    # do.
    fixed_seed = None
    if generator is None:
        generator = torch.Generator("cpu")
        fixed_seed = config.sampling.seed

    def noise_source(given: np.ndarray | Tensor | None) -> sampling.NoiseSource:
        return lambda shape: sampling.initial_noise(
            size, shape, given, generator, fixed_seed=fixed_seed, seeds=seeds
        )

    # The target is checked and normalised here, so that the samplers see tensors only.
    shape = (size, length, config.action.layout.dim)
    return SampleRequest(
        horizon=length,
        noise=noise_source(noise),
        noise_video=noise_source(noise_video),
        mode=mode,
        imagine=imagine,
        action_target=sampling.normalize_target(action_target, config.action.normalization, shape),
    )


def chunk_length(policy: PolicyLike, horizon: int | None = None) -> int:
    """Return the actions per chunk: `horizon` if given, else what was compiled, else the config's.

    Raises:
        ConfigError: It is not positive, or more than a lean Light-WAM knows.
    """
    length = policy.config.action.horizon if policy.engine is None else policy.engine.horizon
    if horizon is not None:
        length = horizon
    if length < 1:
        raise ConfigError(f"`horizon` must be positive, got {length}")
    if isinstance(policy.model, LightWAM):
        policy.model.expert.check_horizon(length)
    return length


def latent_frames(config: PolicyConfig, vae: VAE) -> int:
    """Return the latent frames of a clip, the observed frame included."""
    return 1 + (config.video.frames - 1) // vae.temporal_ratio


# -- normalised actions -> actions -----------------------------------------------------------------


def denormalize_actions(config: PolicyConfig, actions: Tensor) -> np.ndarray:
    """Return normalised actions [B, T, A] in the policy's units, float32, with snapping grippers
    snapped.
    """
    action = config.action
    chunks = action.normalization.denormalize(actions.float().cpu().numpy())
    if action.snap is None:
        return chunks
    return action.snap.apply(chunks, action.normalization)


@torch.no_grad()
def decode_frames(policy: PolicyLike, latents: Tensor) -> np.ndarray:
    """Return the video frames of latents [B, C, f, h, w], uint8 [B, F, H, W, 3]."""
    video = policy.vae.decode(latents.to(policy.dtype))
    return images.to_pixels(video.float().cpu().numpy())


def check_finite_actions(chunks: np.ndarray) -> None:
    """Check that predicted actions are finite: nothing else may reach a robot.

    Raises:
        WeightsError: They are not.
    """
    if not np.isfinite(chunks).all():
        raise WeightsError(
            "the predicted actions are not finite: the weights of the model, the codec or the text "
            "encoder are damaged or their training diverged, or the dtype is too small; take "
            "another checkpoint, or load it with dtype='float32'"
        )


# -- chunks -> single actions ----------------------------------------------------------------------


def make_queue(
    policy: PolicyLike,
    size: int,
    replan: int | Sequence[int] | None,
    ensemble: float | None,
    horizon: int | None,
) -> ActionQueue:
    """Return the queue from which a policy's chunks are executed in `size` envs.

    Arguments are those of `WAMPolicy.queue`.

    Raises:
        ConfigError: `replan` or `horizon` is not positive, more actions would be executed than a
            chunk holds, or snapping grippers would be averaged.

    Warns:
        UserWarning: More actions would be executed than were trained.
    """
    action = policy.config.action
    length = chunk_length(policy, horizon)
    if replan is None:
        replan = action.replan
    if ensemble is None:
        ensemble = action.ensemble
    queue = ActionQueue(size, replan, ensemble, length)

    executed = int(queue.replan.max())
    if executed > length:
        raise ConfigError(
            f"`replan` is {executed} but a chunk holds {length} actions; execute at most {length}"
        )

    # The mean of an open and a closed gripper is neither.
    if queue.ensemble is not None and action.snap is not None:
        raise ConfigError(
            "the grippers of this policy snap to their ends, so chunks cannot be averaged; "
            "omit `ensemble`"
        )

    supervised = action.supervised_steps
    if supervised is not None and executed > supervised:
        warnings.warn(
            f"{executed} actions of each chunk are executed, but only the first {supervised} were "
            f"trained; `policy.queue(replan={supervised})` executes only those",
            stacklevel=3,
        )
    return queue
