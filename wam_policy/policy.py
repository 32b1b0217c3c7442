"""WAMPolicy: observations in, chunks of actions out; loading and saving are one call each."""

# B batch, T actions in a chunk, A numbers per action, H W pixels

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from wam_policy import images
from wam_policy import observation as observations
from wam_policy import sampling as acting
from wam_policy.action_queue import ActionQueue
from wam_policy.config import Form, PolicyConfig, Source
from wam_policy.errors import ConfigError, ObservationError
from wam_policy.hub import checkpoint, forms, frozen_base, load, request
from wam_policy.hub.download import DownloadOptions
from wam_policy.hub.prompt_cache import PromptCache
from wam_policy.hub.upload import upload_folder
from wam_policy.models.encoders.text import PromptEmbeddings
from wam_policy.models.encoders.vae import VAE
from wam_policy.models.fast_wam.variants import ActionMode
from wam_policy.models.light_wam import explain as light_wam_explain
from wam_policy.models.light_wam.model import LightWAM
from wam_policy.models.registry import Model

if TYPE_CHECKING:
    import gymnasium as gym

    from wam_policy.contract import ActionLayout
    from wam_policy.inference.engine import Engine
    from wam_policy.models.fast_wam.loss import Batch
    from wam_policy.models.registry import AnyLossConfig
    from wam_policy.presets import ReleaseInfo

EnvT = TypeVar("EnvT", "gym.Env[Any, Any]", "gym.vector.VectorEnv")


class Imagined(NamedTuple):
    """A chunk of actions and what the model thinks will be seen while it plays."""

    actions: np.ndarray  # float32 [T, A], or [B, T, A] for a batch
    frames: (
        np.ndarray
    )  # uint8 [F, H, W, 3], or [B, F, H, W, 3]: the canvas, the observed frame first


class Explained(NamedTuple):
    """A chunk of actions and what the action head looked at."""

    actions: np.ndarray  # float32 [T, A], or [B, T, A] for a batch
    canvas: np.ndarray  # uint8 [H, W, 3], or [B, H, W, 3]: what the model saw
    maps: np.ndarray  # float32 [K, Q, H, W], or [B, K, Q, H, W]: per tap and query, over the canvas; see `images.split`
    weights: np.ndarray  # float32 [K, Q]: how much each query counts in its tap


class WAMPolicy:
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
        """Put a policy together from its parts; `from_pretrained` is the usual way.

        Args:
            config: its contract.
            model: the experts, on their device and in their dtype.
            vae: the video codec, or what loads it when it is first needed.
            prompts: the prompt embeddings, with or without a text encoder behind them.
            engine: the compiled forward pass of the same model, by which it acts (`compile`).
        """
        self.config, self.model, self.prompts, self.engine = config, model.eval(), prompts, engine
        self._vae = vae
        self._queue: ActionQueue | None = None
        self._generator = torch.Generator().manual_seed(config.sampling.seed)

    # -- loading and saving ------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        id_or_folder: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        filename: str | None = None,
        trained: ReleaseInfo | None = None,
        stats: str | Path | None = None,
        device: str | torch.device = "cpu",
        text_device: str | torch.device | None = None,
        prompt_cache: str | Path | None = None,
        dtype: torch.dtype | None = None,
    ) -> WAMPolicy:
        """Load a policy from a folder, a file or the Hugging Face Hub.

        Besides this package's own checkpoints it reads LeRobot's `fastwam` folders and the reference implementations' `.pt`
        files, whose `dataset_stats.json`, and of a Light-WAM `config.yaml`, stand beside them. No code in a file is ever run.

        Args:
            id_or_folder: a local folder or file, or a Hub id "organisation/name".
            revision: branch, tag or commit on the Hub.
            cache_dir: where downloads are kept.
            force_download: download again what is cached.
            local_files_only: never touch the network.
            token: Hub token; True takes the stored one.
            filename: the file of the reference implementation, in a folder or repository of several.
            trained: what such a file doesn't say about itself; releases are known by their file's name.
            stats: its `dataset_stats.json`; the default is the one beside it, or in the folders of its run.
            device: where the policy runs.
            text_device: where its text encoder runs, should it be needed; the default is `device`.
            prompt_cache: a folder of prompt embeddings of this policy's text encoder, ours or the reference implementations';
                a prompt that is in it never needs the encoder, one that isn't is added.
            dtype: what it computes in; the default is its config's.

        Raises:
            CheckpointError: no such checkpoint, or weights that can't be read or don't fit.
            ConfigError: a contract that is incomplete, inconsistent or of a newer format.
        """
        download = DownloadOptions(
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
        )
        parts = load.load_policy(
            request.CheckpointRequest(
                id_or_folder, filename, trained, None if stats is None else Path(stats)
            ),
            download,
            device=torch.device(device),
            text_device=None if text_device is None else torch.device(text_device),
            dtype=dtype,
        )
        if prompt_cache is not None:
            parts.prompts.cache = PromptCache(Path(prompt_cache), parts.config.prompt.token_length)
        return cls(parts.config, parts.model, vae=parts.vae, prompts=parts.prompts)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        notes: str = "",
        form: Form | None = None,
        base: Source | None = None,
    ) -> Path:
        """Write the policy as a checkpoint folder: `config.json`, `model.safetensors`, prompts, codec, card.

        A kill in the middle leaves the old checkpoint, or a folder that `from_pretrained` refuses as incomplete.

        Args:
            folder: where; made if it doesn't exist, other files in it stay.
            dtype: what the weights are stored in; the default is what they are.
            notes: markdown for the end of the card, for example results.
            form: what of a Light-WAM is written: all of it ("fat"), only what was trained ("slim"), or what acting needs,
                folded together ("lean"); the default is what the policy was loaded from.
            base: of a slim checkpoint: where the frozen video expert is; it is fetched and compared. The default is where the
                policy has it from.

        Raises:
            ConfigError: a form this policy doesn't have, a slim one without a base.
            CheckpointError: a base that can't be found or isn't this policy's.
        """
        folder = Path(folder)
        self._write(folder, dtype, f"path/to/{folder.name}", notes, form, base)
        return folder

    def _write(
        self,
        folder: Path,
        dtype: torch.dtype | None,
        load_by: str,
        notes: str,
        form: Form | None,
        base: Source | None,
    ) -> PolicyConfig:
        parts = checkpoint.PolicyParts(self.config, self.model, lambda: self.vae, self.prompts)
        shaped = forms.to_form(parts, form, base, dtype, folder)
        checkpoint.write_checkpoint(folder, shaped, dtype=dtype, load_by=load_by, notes=notes)
        return shaped.config

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | bool | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload policy",
        create_pr: bool = False,
        dtype: torch.dtype | None = None,
        notes: str = "",
        form: Form | None = None,
        base: Source | None = None,
    ) -> str:
        """Upload the policy to the Hub as one commit and return the commit's address.

        Args:
            repo_id: "organisation/name"; made if it doesn't exist.
            token: Hub token; the default is the stored one.
            private: whether a new repository is private.
            revision: branch to commit to.
            commit_message: first line of the commit.
            create_pr: open a pull request instead of committing.
            dtype: what the weights are stored in.
            notes: markdown for the end of the card.
            form: as in `save_pretrained`.
            base: as in `save_pretrained`.
        """
        with tempfile.TemporaryDirectory() as folder:
            written = self._write(Path(folder), dtype, repo_id, notes, form, base)
            if written.base is not None:
                frozen_base.refuse_unpublished(written.base, repo_id)
            return upload_folder(
                Path(folder),
                repo_id,
                token=token,
                private=private,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
            )

    # -- contract ----------------------------------------------------------------------------------------------------

    @property
    def spec(self) -> PolicyConfig:
        """The policy's contract: cameras, state, actions, prompt, sampling."""
        return self.config

    @property
    def device(self) -> torch.device:
        """Where the policy runs."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the policy computes in."""
        return next(self.model.parameters()).dtype

    @property
    def vae(self) -> VAE:
        """The video codec, loaded when it is first asked for."""
        if not isinstance(self._vae, VAE):
            self._vae = self._vae()
        return self._vae

    def add_prompt(self, instruction: str, embedding: Tensor | None = None) -> None:
        """Learn an instruction: from its embedding [n, text_dim], or by the checkpoint's text encoder."""
        prompt = self.config.prompt.prompt(instruction)
        if embedding is None:
            self.prompts.add([prompt])
        else:
            self.prompts.put(prompt, embedding)

    def drop_text_encoder(self) -> None:
        """Free the text encoder's memory; known prompts stay, and a new one loads it again."""
        self.prompts.drop_encoder()

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
    ) -> EnvT:
        """Wrap an env, single or vector, so that this policy can drive it.

        What the env declares in its `contract` is taken from there; arguments say it for an env that declares nothing.

        Args:
            env: the env.
            cameras: camera name -> path in the observation ("pixels.front"), or "render()"; known aliases of the policy's
                names will do (`wam_policy.cameras`).
            rotated_cameras: the cameras whose pictures are upside down, as LIBERO's are.
            state: path of the state vector.
            state_names: what its numbers are; the policy picks the ones it wants by name.
            instruction: the sentence to follow; the default is the env's `instruction` attribute.
            action: what the env's actions mean.

        Raises:
            EnvError: the env declares nothing and nothing is said, or has no pixels.
            ActionError: the policy's actions can't be mapped onto the env's.
        """
        from wam_policy.wrappers.wrap import wrap

        given = {
            "cameras": cameras,
            "rotated_cameras": rotated_cameras,
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
            overrides={name: value for name, value in given.items() if value is not None},
        )
        return cast("EnvT", wrapped)

    # -- acting ------------------------------------------------------------------------------------------------------

    def predict_chunk(
        self,
        observation: Any,
        noise: np.ndarray | Tensor | None = None,
        *,
        seeds: Sequence[int] | None = None,
        action_target: acting.ActionTarget | None = None,
        mode: ActionMode | None = None,
        horizon: int | None = None,
    ) -> np.ndarray:
        """Predict one chunk of actions for each observation.

        Args:
            observation: one observation or a batch (see `wam_policy.observation`).
            noise: initial noise [T, A] or [B, T, A] of a Fast-WAM; the default is what the contract says: fixed by its seed and
                the same for every sample, or fresh.
            seeds: a seed for each observation, to draw its initial noise from.
            action_target: actions that are known before, which the chunk continues: a Fast-WAM fits the others to them, a
                Light-WAM's are mixed with them.
            mode: what the actions see while they are denoised, where the variant leaves a choice (`models.variants`).
            horizon: actions per chunk T; the default is the contract's, which the policy was trained with. In a Light-WAM the
                first actions don't depend on it, in a Fast-WAM all do.

        Returns:
            float32 [T, A], or [B, T, A] for a batch, in the units the policy was trained with.

        Raises:
            ObservationError: the observation doesn't fit the contract.
            PromptError: an instruction can't be embedded.
            ConfigError: the variant wasn't trained for this mode, a horizon below 1, noise for a model that takes none.
        """
        seen = self._check(observation)
        chunks, _ = self._sample(
            seen, noise, seeds=seeds, known=action_target, mode=mode, horizon=horizon
        )
        return chunks if seen.batched else chunks[0]

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

        In the modes "joint" and "idm" the actions depend on these frames. In the mode "first_frame" (the fast variant) and in a
        Light-WAM they do NOT: the frames show what the model learned about the world, not why it acts.

        Args:
            observation: one observation or a batch (see `wam_policy.observation`).
            noise: initial noise of the actions, as in `predict_chunk`.
            noise_video: initial noise of the clip's latents, [C, f, h, w] or [B, C, f, h, w], whose first frame is not used;
                the default is drawn like that of the actions. A Light-WAM's h and w are those of its pooled grid.
            mode: as in `predict_chunk`.
            horizon: as in `predict_chunk`; the frames are those of the contract.

        Returns:
            The actions, those of `predict_chunk` for the same noise, and the frames, `config.video.stride` env steps apart;
            a Light-WAM's are smaller than its canvas by `config.model.video_pool`.

        Raises:
            As `predict_chunk`.
        """
        seen = self._check(observation)
        chunks, latents = self._sample(
            seen, noise, noise_video, mode=mode, horizon=horizon, imagine=True
        )
        assert latents is not None
        with torch.no_grad():
            video = self.vae.decode(latents.to(self.dtype))
        frames = images.to_pixels(video.float().cpu().numpy())
        return Imagined(chunks, frames) if seen.batched else Imagined(chunks[0], frames[0])

    def predict(
        self,
        observation: Any,
        state: ActionQueue | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, ActionQueue]:
        """Predict the next action of each env, with the signature of Stable-Baselines3.

        A chunk is played action by action; a new one is predicted when `replan` actions of it are used up. An episode's first
        observation drops what is left: it is marked by the observation's own `episode_start` (envs wrapped by `wrap` have it),
        by the argument, or by calling `reset`.

        Args:
            observation: one observation or a batch.
            state: what an earlier call returned, to play several loops with one policy; the default is the policy's own.
            episode_start: bool [B], true where an episode begins.
            deterministic: False draws new noise for every chunk.

        Returns:
            float32 [A] or [B, A], and the queue that was played from.
        """
        seen = self._check(observation)
        if state is not None and state.size != len(seen):
            raise ObservationError(
                f"`state` belongs to {state.size} envs, the observation has {len(seen)}"
            )
        queue = state if state is not None else self._queue
        if queue is None or queue.size != len(seen):
            queue = self.queue(len(seen))
        if state is None:
            self._queue = queue
        starts = seen.episode_start | observations.episode_flags(episode_start, len(seen))
        queue.reset(starts)
        empty = queue.empty()
        if empty.any():  # of a part of the envs nothing older may be used
            seen = dataclasses.replace(
                seen, episode_start=starts if empty.all() else np.ones(len(seen), bool)
            )
            queue.push(
                self._sample(_pick(seen, empty), horizon=queue.horizon, fresh=not deterministic)[0],
                empty,
            )
        actions = queue.pop()
        return (actions if seen.batched else actions[0]), queue

    def queue(
        self,
        size: int = 1,
        replan: int | Sequence[int] | None = None,
        ensemble: float | None = None,
        horizon: int | None = None,
    ) -> ActionQueue:
        """A queue of chunks to play by `predict(observation, state=queue)`.

        Args:
            size: number of envs.
            replan: actions played of a chunk, or a number for each chunk of an episode (see `ActionQueue`); the default is the
                contract's.
            ensemble: average chunks that overlap (see `ActionQueue`); the default is the contract's.
            horizon: actions per chunk; the default is the contract's.

        Raises:
            ConfigError: more actions are to be played than a chunk holds, or grippers that snap are to be averaged.
        """
        action, steps = self.config.action, self.chunk_length(horizon)
        played, decay = (
            action.replan if replan is None else replan,
            action.ensemble if ensemble is None else ensemble,
        )
        queue = ActionQueue(size, played, decay, steps)
        most = int(queue.replan.max())
        if most > steps:
            raise ConfigError(
                f"`replan` is {most}, a chunk holds {steps} actions; play fewer of them"
            )
        if queue.ensemble is not None and action.snap is not None:
            raise ConfigError(
                "this policy's grippers snap to their end: chunks can't be averaged, leave `ensemble` out"
            )
        if action.supervised_steps is not None and most > action.supervised_steps:
            warnings.warn(
                f"{most} actions of each chunk are played, but only the first {action.supervised_steps} were trained; "
                f"`policy.queue(replan={action.supervised_steps})` plays no others",
                stacklevel=2,
            )
        return queue

    def trainable_parameters(self) -> list[Tensor]:
        """The weights to give an optimizer: all that aren't frozen; of a Light-WAM the video expert's trunk is frozen here.

        Raises:
            ConfigError: a lean Light-WAM, which only acts.
        """
        from wam_policy import fine_tuning as training

        return training.trainable_parameters(self)

    def training_step(
        self,
        batch: Mapping[str, Any] | Batch,
        *,
        loss: AnyLossConfig | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, to be minimised inside your own loop.

        Args:
            batch: `images.<camera>` uint8 [B, F, H, W, 3] for each camera, the observed frame first and the others
                `spec.video.stride` steps apart; `state` [B, P], `action` float [B, T, A] in the policy's units, `instruction`
                B sentences; optionally `action_is_pad` bool [B, T] and `frame_is_pad` bool [B, F]. Or an encoded batch.
            loss: what the losses weigh; the default is the family's, with the shifts of the contract.
            generator: of the noise and timesteps, on the policy's device; the default is PyTorch's own.

        Returns:
            The loss, and its parts "video" and "action" without gradients.

        Raises:
            DatasetError: actions, clips or padding don't fit the contract.
            ObservationError: cameras or state don't.
            PromptError: an instruction can't be embedded.
        """
        from wam_policy import fine_tuning as training

        return training.training_step(self, batch, loss, generator)

    def compile(self, **options: Any) -> WAMPolicy:
        """The same policy with a compiled forward pass; see `wam_policy.inference.compile_inference` for the options."""
        from wam_policy.inference import compile_inference

        return compile_inference(self, **options)

    def explain(self, observation: Any, *, horizon: int | None = None) -> Explained:
        """Predict one chunk and show what the action head of a Light-WAM looked at.

        Args:
            observation: one observation or a batch (see `wam_policy.observation`).
            horizon: as in `predict_chunk`.

        Returns:
            The actions of `predict_chunk`, the canvas, a map of it per tap and query, and how much each query counts.

        Raises:
            As `predict_chunk`; ConfigError: the policy has no learned queries.
        """
        model, seen = light_wam_explain.check_can_explain(self.model), self._check(observation)
        canvas = images.compose_canvas(seen.images, self.config.cameras).round().astype(np.uint8)
        height, width = canvas.shape[1:3]
        actions, maps, weights = light_wam_explain.attention_maps(
            model, *self._encode_observation(seen), (height, width), self.chunk_length(horizon)
        )
        chunks = self.denormalize_actions(actions)
        return (
            Explained(chunks, canvas, maps, weights)
            if seen.batched
            else Explained(chunks[0], canvas[0], maps[0], weights)
        )

    def canvas(self, observation: Any) -> np.ndarray:
        """What the model sees of an observation or a batch: float32 [3, H, W] or [B, 3, H, W], in [-1, 1].

        Raises:
            ObservationError: the observation doesn't fit the contract.
        """
        seen = self._check(observation)
        canvas = images.canvas(seen.images, self.config.cameras)
        return canvas if seen.batched else canvas[0]

    def reset(self, mask: np.ndarray | None = None) -> None:
        """Begin new episodes: drop what is left of the chunks, of all envs or of those where `mask` [B] is true."""
        if self._queue is not None:
            self._queue.reset(mask)

    def _check(self, observation: Any) -> observations.Observation:
        state = self.config.state
        return observations.check_observation(
            observation, self.config.cameras.names, None if state is None else state.names
        )

    def prepare_input(self, observation: Any) -> acting.ModelInput:
        """An observation or a batch as a model takes it, always as a batch.

        Raises:
            ObservationError: the observation doesn't fit the contract.
        """
        return self._prepare(self._check(observation))

    def _prepare(self, seen: observations.Observation) -> acting.ModelInput:
        config, proprio = self.config, None
        if config.state is not None and seen.state is not None:
            proprio = config.state.normalization.normalize(seen.state)
        prompts = [config.prompt.prompt(instruction) for instruction in seen.instructions]
        return acting.ModelInput(
            images.canvas(seen.images, config.cameras), proprio, prompts, seen.episode_start
        )

    @torch.no_grad()
    def _encode_observation(self, seen: observations.Observation) -> tuple[Tensor, Tensor]:
        """Latents [B, C, 1, h, w] of the observed canvases, and the context [B, L + 1, text_dim]."""
        device, dtype = self.device, self.dtype
        canvas, state, prompts, _ = self._prepare(seen)
        proprio = None if state is None else torch.from_numpy(state).to(device, dtype)
        context = self.model.context(
            self.prompts.embed(prompts, device=device, dtype=dtype), proprio
        )
        return self.vae.encode_first_frame(torch.from_numpy(canvas).to(device, dtype)), context

    def _sample(
        self,
        seen: observations.Observation,
        noise: np.ndarray | Tensor | None = None,
        noise_video: np.ndarray | Tensor | None = None,
        *,
        seeds: Sequence[int] | None = None,
        known: acting.ActionTarget | None = None,
        mode: ActionMode | None = None,
        horizon: int | None = None,
        fresh: bool = False,
        imagine: bool = False,
    ) -> tuple[np.ndarray, Tensor | None]:
        """Chunks [B, T, A] of checked observations and, where they are wanted, latents [B, C, f, h, w] of the clips."""
        steps = self.chunk_length(horizon)
        if (noise is not None or seeds is not None) and self.config.sampling.action_shift is None:
            raise ConfigError(
                "a Light-WAM reads its actions off in one pass: it takes no `noise` and no `seeds`"
            )

        sampling = self.config.sampling
        fixed = None if fresh or sampling.noise == "fresh" else sampling.seed

        def drawn(given: np.ndarray | Tensor | None) -> acting.Noise:
            return lambda shape: acting.initial_noise(
                len(seen), shape, given, self._generator, fixed_seed=fixed, seeds=seeds
            )

        action = self.config.action
        before = acting.normalize_target(
            known, action.normalization, (len(seen), steps, action.layout.dim)
        )
        wish = acting.SampleRequest(steps, drawn(noise), drawn(noise_video), mode, imagine, before)
        if self.engine is not None and not imagine:
            return self.denormalize_actions(self.engine(self._prepare(seen), wish)), None
        actions, latents = acting.sample_actions(
            self.config, self.model, *self._encode_observation(seen), self.latent_frames, wish
        )
        return self.denormalize_actions(actions), latents

    @property
    def latent_frames(self) -> int:
        """Latent frames of a clip, the observed one among them."""
        return 1 + (self.config.video.frames - 1) // self.vae.temporal_ratio

    def chunk_length(self, horizon: int | None = None) -> int:
        """Actions per chunk: as many as wanted, else as compiled, else the contract's.

        Raises:
            ConfigError: none, or more than a lean Light-WAM knows.
        """
        usual = self.config.action.horizon if self.engine is None else self.engine.options.horizon
        steps = usual if horizon is None else horizon
        if steps < 1:
            raise ConfigError(f"`horizon` must be positive, got {steps}")
        if isinstance(self.model, LightWAM):
            self.model.expert.check_horizon(steps)
        return steps

    def denormalize_actions(self, actions: Tensor) -> np.ndarray:
        """Normalised actions [B, T, A] in the units the policy was trained with, its grippers snapped if they are to be."""
        action = self.config.action
        chunks = action.normalization.denormalize(actions.float().cpu().numpy())
        return chunks if action.snap is None else action.snap.apply(chunks, action.normalization)


def _pick(seen: observations.Observation, mask: np.ndarray) -> observations.Observation:
    """The observations where `mask` [B] is true."""
    return dataclasses.replace(
        seen,
        images={name: picture[mask] for name, picture in seen.images.items()},
        state=None if seen.state is None else seen.state[mask],
        instructions=tuple(s for s, wanted in zip(seen.instructions, mask, strict=True) if wanted),
        episode_start=seen.episode_start[mask],
    )
