"""The public facade: wrap an env, predict actions, look inside, compile, fine-tune.

Loading and saving (`from_pretrained`, `save_pretrained`, `push_to_hub`) are
`wam_policy.hub.mixin.HubMixin`.
"""

# B batch, T actions in a chunk, A numbers per action, P components of the state, F frames,
# f latent frames, C latent channels, h w latent grid, H W pixels of the canvas

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from wam_policy import fine_tuning, images, pipeline
from wam_policy.action_queue import ActionQueue, OwnQueue
from wam_policy.config import PolicyConfig
from wam_policy.errors import ConfigError, ObservationError
from wam_policy.hub.mixin import HubMixin
from wam_policy.hub.weights import check_finite
from wam_policy.inference import compile_inference
from wam_policy.models.encoders.text import PromptEmbeddings
from wam_policy.models.encoders.vae import VAE
from wam_policy.models.fast_wam.variants import ActionMode
from wam_policy.models.light_wam.explain import attention_maps, check_can_explain
from wam_policy.models.registry import Model
from wam_policy.observation import Observation, episode_flags
from wam_policy.outputs import Explained, Imagined
from wam_policy.sampling import ActionTarget
from wam_policy.utils.deprecation import renamed, warn_renamed
from wam_policy.utils.generators import PicklableGenerator
from wam_policy.utils.locks import PicklableLock

if TYPE_CHECKING:
    import gymnasium as gym

    from wam_policy.contract import ActionLayout
    from wam_policy.inference.engine import Engine
    from wam_policy.models.fast_wam.loss import Batch
    from wam_policy.models.registry import AnyLossConfig

EnvT = TypeVar("EnvT", "gym.Env[Any, Any]", "gym.vector.VectorEnv")


class WAMPolicy(HubMixin):
    """A World Action Model as a robot policy.

    Example:
        >>> from wam_policy import WAMPolicy
        >>> from wam_policy.checkpoints import embedded
        >>> policy = WAMPolicy.from_pretrained(embedded("metaworld-fast-wam"))
        >>> policy.config.cameras.names
        ('front', 'wrist')
    """

    def __init__(
        self,
        config: PolicyConfig,
        model: Model,
        *,
        vae: VAE | Callable[[], VAE],
        prompts: PromptEmbeddings,
        engine: Engine | None = None,
    ) -> None:
        """Assemble a policy from its parts; `from_pretrained` is the usual way.

        Args:
            config: Config of the policy: cameras, state, actions, prompt, sampling.
            model: Model on its device and in its dtype.
            vae: Video codec, or a function that loads it when it is first needed.
            prompts: Prompt embeddings.
            engine: Compiled forward pass (see `compile`).
        """
        self.config = config
        self.model = model.eval()
        self.prompts = prompts
        self.engine = engine
        self.instruction: str | None = None  # of observations that hold none
        self._vae = vae
        self._lock = PicklableLock()
        self._weights_are_finite = False
        self._own_queue = OwnQueue()
        self._generator = PicklableGenerator().manual_seed(config.sampling.seed)

    # -- parts -------------------------------------------------------------------------------------

    @property
    def spec(self) -> PolicyConfig:
        """Deprecated name of `config`."""
        warn_renamed("`policy.spec`", "`policy.config`")
        return self.config

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype the model computes in."""
        return next(self.model.parameters()).dtype

    @property
    def vae(self) -> VAE:
        """Video codec, loaded when it is first needed."""
        with self._lock:
            if not isinstance(self._vae, VAE):
                self._vae = self._vae()
            return self._vae

    def add_prompt(self, instruction: str, embedding: Tensor | None = None) -> None:
        """Add an instruction by its embedding [n, text_dim], or by the text encoder."""
        prompt = self.config.prompt.prompt(instruction)
        if embedding is None:
            self.prompts.add([prompt])
        else:
            self.prompts.put(prompt, embedding)

    def drop_text_encoder(self) -> None:
        """Free the text encoder; a new prompt loads it again."""
        self.prompts.drop_encoder()

    def with_engine(self, config: PolicyConfig, engine: Engine) -> Self:
        """Return a policy with the same parts that acts by a compiled engine (see `compile`)."""
        return type(self)(config, self.model, vae=self.vae, prompts=self.prompts, engine=engine)

    def check_weights(self) -> None:
        """Raise a WeightsError if a weight is NaN or infinite; the first prediction does it."""
        if not self._weights_are_finite:
            check_finite(self.model.named_parameters(), "the policy")
            self._weights_are_finite = True

    # -- environments ------------------------------------------------------------------------------

    def wrap(
        self,
        env: EnvT,
        *,
        cameras: Mapping[str, str] | None = None,
        rotated_cameras: tuple[str, ...] | None = None,
        state: str | None = None,
        state_names: tuple[str, ...] | None = None,
        instruction: str | None = None,
        action: ActionLayout | None = None,
        text: bool = True,
        render_size: tuple[int, int] | None = None,
        turned: tuple[str, ...] | None = None,
    ) -> EnvT:
        """Wrap an env, single or vector, so that this policy can drive it.

        What the env declares in its `contract` is taken from there; arguments override it, and
        describe an env that declares nothing.

        Args:
            env: Env to wrap.
            cameras: Camera name -> path in the observation ("pixels.front"), or "render()". Known
                aliases of the policy's camera names are accepted (`wam_policy.cameras`).
            rotated_cameras: Cameras whose images are upside down, as LIBERO's are.
            state: Path of the state vector.
            state_names: Names of its numbers.
            instruction: Instruction to follow; the default is the env's `instruction` attribute.
            action: Meaning of the env's actions.
            text: Whether observations hold the instruction (see docs/environments.md).
            render_size: Size of `env.render()`, where the space is needed before the first reset.
            turned: Deprecated name of `rotated_cameras`.

        Raises:
            EnvError: The contract is incomplete or invalid, or something is missing or swapped.
            ActionError: The policy's actions cannot be mapped onto the env's.
        """
        from wam_policy.wrappers.wrap import wrap

        overrides = {
            "cameras": cameras,
            "rotated_cameras": renamed("turned", turned, "rotated_cameras", rotated_cameras),
            "state": state,
            "state_names": state_names,
            "instruction": instruction,
            "action": action,
        }
        wrapped = wrap(
            env,
            cameras=self.config.cameras.names,
            state_names=None if self.config.state is None else self.config.state.names,
            layout=self.config.action.layout,
            overrides={name: value for name, value in overrides.items() if value is not None},
            text=text,
            render_size=render_size,
        )
        return cast("EnvT", wrapped)

    # -- prediction --------------------------------------------------------------------------------

    def predict_chunk(
        self,
        observation: Any,
        noise: np.ndarray | Tensor | None = None,
        *,
        seeds: Sequence[int] | None = None,
        action_target: ActionTarget | None = None,
        mode: ActionMode | None = None,
        horizon: int | None = None,
        known: ActionTarget | None = None,
    ) -> np.ndarray:
        """Predict one chunk of actions for each observation.

        Args:
            observation: One observation or a batch (see `wam_policy.observation`).
            noise: Initial noise [T, A] or [B, T, A] of a Fast-WAM; the default follows the config:
                fixed by its seed and the same for every sample, or new for every call.
            seeds: One seed per observation to draw its initial noise from.
            action_target: Actions that the chunk continues: a Fast-WAM's fit, a Light-WAM's are
                interpolated.
            mode: What the actions attend to, for variants that were trained for several modes.
            horizon: Actions per chunk, T; the default is the compiled one, else the config's. The
                first actions of a Light-WAM do not depend on it, all actions of a Fast-WAM do.
            known: Deprecated name of `action_target`.

        Returns:
            float32 [T, A], or [B, T, A] for a batch, in the units the policy was trained with.

        Raises:
            ObservationError: The observation does not fit the config.
            PromptError: An instruction cannot be embedded.
            ConfigError: The variant was not trained for this mode, the horizon is not possible, or
                the model takes no noise.
        """
        target = renamed("known", known, "action_target", action_target)
        checked = pipeline.read_observation(self.config, observation, self.instruction)
        chunks, _ = self._sample(
            checked, noise=noise, seeds=seeds, action_target=target, mode=mode, horizon=horizon
        )
        return chunks if checked.batched else chunks[0]

    def predict(
        self,
        observation: Any,
        state: ActionQueue | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, ActionQueue]:
        """Predict the next action of each env, with the signature of Stable-Baselines3.

        A chunk is executed action by action; a new one is predicted when `replan` of its actions
        are used up. The first observation of an episode drops the rest of the chunk. It is marked
        by the observation's own `episode_start` (envs wrapped by `wrap` have it), by the argument,
        or by a call of `reset`.

        Args:
            observation: One observation or a batch.
            state: Queue returned by an earlier call, to drive several loops with one policy; the
                default is the policy's own queue, which one thread uses at a time.
            episode_start: bool [B], true where an episode begins.
            deterministic: False draws new noise for every chunk.

        Returns:
            float32 [A] or [B, A], and the queue that the action was taken from.

        Raises:
            ObservationError: The observation does not fit the config, `state` belongs to another
                number of envs, or another thread uses the policy's own queue.
            PromptError: An instruction cannot be embedded.
        """
        checked = pipeline.read_observation(self.config, observation, self.instruction)
        size = len(checked)
        queue = self._own_queue.of_size(size, self.queue) if state is None else state
        if queue.size != size:
            raise ObservationError(
                f"`state` belongs to {queue.size} envs, the observation has {size}"
            )

        starts = checked.episode_start | episode_flags(episode_start, size)
        queue.reset(starts)
        empty = queue.empty()
        if empty.any():
            # A compiled policy may reuse the encoding of an earlier observation, but only if all
            # envs ask together.
            encode = starts if empty.all() else np.ones(size, bool)
            checked = dataclasses.replace(checked, episode_start=encode)
            chunks, _ = self._sample(
                pipeline.select_observations(checked, empty),
                horizon=queue.horizon,
                new_noise=not deterministic,
            )
            queue.push(chunks, empty)

        actions = queue.pop()
        return (actions if checked.batched else actions[0]), queue

    def reset(self, mask: np.ndarray | None = None) -> None:
        """Begin new episodes: drop the rest of all chunks, or of those where `mask` [B] is true."""
        self._own_queue.reset(mask)

    def queue(
        self,
        size: int = 1,
        replan: int | Sequence[int] | None = None,
        ensemble: float | None = None,
        horizon: int | None = None,
    ) -> ActionQueue:
        """Return a queue of chunks to execute by `predict(observation, state=queue)`.

        Args:
            size: Number of envs.
            replan: Actions executed of a chunk, or a number for each chunk of an episode (see
                `ActionQueue`); the default is the config's.
            ensemble: Average overlapping chunks (see `ActionQueue`); the default is the config's.
            horizon: Actions per chunk; the default is as in `predict_chunk`.

        Raises:
            ConfigError: A number is impossible, or snapping grippers would be averaged.

        Warns:
            UserWarning: More actions would be executed than were trained.
        """
        return pipeline.make_queue(self, size, replan, ensemble, horizon)

    def chunk_length(self, horizon: int | None = None) -> int:
        """Return the actions per chunk: `horizon`, else what was compiled, else the config's.

        Raises:
            ConfigError: It is not positive, or more than a lean Light-WAM knows.
        """
        return pipeline.chunk_length(self, horizon)

    def _sample(
        self,
        observation: Observation,
        *,
        noise: np.ndarray | Tensor | None = None,
        noise_video: np.ndarray | Tensor | None = None,
        seeds: Sequence[int] | None = None,
        action_target: ActionTarget | None = None,
        mode: ActionMode | None = None,
        horizon: int | None = None,
        new_noise: bool = False,
        imagine: bool = False,
    ) -> tuple[np.ndarray, Tensor | None]:
        """Return chunks [B, T, A], and latents [B, C, f, h, w] if they are requested.

        Arguments are those of `pipeline.make_request`; `new_noise` overrules a fixed noise.
        """
        self.check_weights()
        sampling = self.config.sampling
        if sampling.action_shift is None and (noise is not None or seeds is not None):
            raise ConfigError(
                "a Light-WAM predicts its actions in one pass: it takes no `noise` and no `seeds`"
            )
        new_noise = new_noise or sampling.noise == "fresh"
        request = pipeline.make_request(
            self,
            len(observation),
            noise=noise,
            noise_video=noise_video,
            seeds=seeds,
            action_target=action_target,
            mode=mode,
            horizon=horizon,
            generator=self._generator if new_noise else None,
            imagine=imagine,
        )
        inputs = pipeline.prepare_input(self.config, observation)
        actions, latents = pipeline.sample(self, inputs, request)
        chunks = pipeline.denormalize_actions(self.config, actions)
        pipeline.check_finite_actions(chunks)
        return chunks, latents

    # -- looking inside ----------------------------------------------------------------------------

    def imagine(
        self,
        observation: Any,
        noise: np.ndarray | Tensor | None = None,
        noise_video: np.ndarray | Tensor | None = None,
        *,
        mode: ActionMode | None = None,
        horizon: int | None = None,
    ) -> Imagined:
        """Predict one chunk of actions and the future video frames.

        In the modes "joint" and "idm" the actions depend on these frames. In the mode "first_frame"
        (the fast variant) and in a Light-WAM they do not: the frames show what the model has
        learned about the world, not why it acts.

        Args:
            observation: One observation or a batch (see `wam_policy.observation`).
            noise: Initial noise of the actions, as in `predict_chunk`.
            noise_video: Initial noise of the clip's latents, [C, f, h, w] or [B, C, f, h, w], whose
                first frame is not used; the default follows the config. A Light-WAM's h and w are
                those of its pooled grid.
            mode: As in `predict_chunk`.
            horizon: As in `predict_chunk`; the frames are those of the config.

        Returns:
            The actions of `predict_chunk` for the same noise, and frames `config.video.stride` env
            steps apart; those of a Light-WAM are smaller than its canvas by the factor
            `config.model.video_pool`.

        Raises:
            As `predict_chunk`.
        """
        checked = pipeline.read_observation(self.config, observation, self.instruction)
        chunks, latents = self._sample(
            checked,
            noise=noise,
            noise_video=noise_video,
            mode=mode,
            horizon=horizon,
            imagine=True,
        )
        assert latents is not None
        frames = pipeline.decode_frames(self, latents)
        return Imagined(chunks, frames) if checked.batched else Imagined(chunks[0], frames[0])

    def explain(self, observation: Any, *, horizon: int | None = None) -> Explained:
        """Predict one chunk and show what the action head of a Light-WAM attends to.

        Args:
            observation: One observation or a batch (see `wam_policy.observation`).
            horizon: As in `predict_chunk`.

        Raises:
            As `predict_chunk`; ConfigError: The policy has no learned queries.
        """
        self.check_weights()
        model = check_can_explain(self.model)
        checked = pipeline.read_observation(self.config, observation, self.instruction)
        canvas = images.compose_canvas(checked.images, self.config.cameras)
        canvas = canvas.round().astype(np.uint8)
        inputs = pipeline.prepare_input(self.config, checked)
        encoded = pipeline.encode_observation(self, inputs)
        length = self.chunk_length(horizon)
        actions, maps, weights = attention_maps(model, *encoded, canvas.shape[1:3], length)
        chunks = pipeline.denormalize_actions(self.config, actions)
        if checked.batched:
            return Explained(chunks, canvas, maps, weights)
        return Explained(chunks[0], canvas[0], maps[0], weights)

    def canvas(self, observation: Any) -> np.ndarray:
        """Return the canvas the model sees: float32 [3, H, W] or [B, 3, H, W], in [-1, 1].

        Raises:
            ObservationError: The observation does not fit the config.
        """
        checked = pipeline.read_observation(self.config, observation, self.instruction)
        canvas = images.canvas(checked.images, self.config.cameras)
        return canvas if checked.batched else canvas[0]

    # -- compiling and training --------------------------------------------------------------------

    def compile(self, **options: Any) -> WAMPolicy:
        """Return the policy with a compiled forward pass; options as `compile_inference`."""
        return compile_inference(self, **options)

    def trainable_parameters(self) -> list[Tensor]:
        """Return the weights to give to an optimizer; those of a frozen video expert are frozen.

        Raises:
            ConfigError: The policy is a lean Light-WAM, which only acts.

        Warns:
            UserWarning: The weights are not float32: small updates would be lost.
        """
        return fine_tuning.trainable_parameters(self)

    def training_step(
        self,
        batch: Mapping[str, Any] | Batch,
        *,
        loss: AnyLossConfig | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch, to be minimised in your own loop.

        Args:
            batch: `images.<camera>` uint8 [B, F, H, W, 3] for each camera, the observed frame first
                and the others `config.video.stride` steps apart; `state` [B, P]; `action` float [B,
                T, A] in the policy's units; `instruction`, B strings; optionally `action_is_pad`
                bool [B, T] and `frame_is_pad` bool [B, F]. Or an encoded batch.
            loss: Weights and shifts of the losses; the default is the family's, with the shifts of
                the config.
            generator: Source of noise and timesteps on the policy's device; the default is
                PyTorch's global one.

        Returns:
            The total loss, and its parts "video" and "action" without gradients.

        Raises:
            DatasetError: Actions, clips or padding do not fit the config.
            ObservationError: Cameras or state do not fit the config.
            PromptError: An instruction cannot be embedded.
            ConfigError: `loss` belongs to the other family.
        """
        self.check_weights()
        return fine_tuning.training_step(self, batch, loss, generator)
