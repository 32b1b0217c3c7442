"""A dataset as a training loop samples it: windows encoded once, vectors normalised."""

# N windows, C latent channels, F latent frames, h w latent grid, T actions in a chunk,
# A numbers per action, P numbers of state, B batch, L tokens of a prompt

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wam_policy.config import PolicyConfig
from wam_policy.data.config import DataConfig
from wam_policy.data.latent_cache import LatentShards, load_or_encode
from wam_policy.data.mixture import Mixture
from wam_policy.data.windows import Windows, padded_actions, policy_windows
from wam_policy.models.encoders.text import PromptEmbeddings
from wam_policy.models.encoders.vae import VAE
from wam_policy.models.fast_wam.loss import Batch, latent_padding
from wam_policy.models.layers.text_padding import condense_padding

# Fields of `EncodedDataset` with one entry per window; the others are shared by all windows.
_PER_WINDOW = (
    "latent_index",
    "latent_is_pad",
    "action",
    "action_is_pad",
    "proprio",
    "prompt",
    "episode",
    "dataset_index",
)


@dataclass(frozen=True)
class EncodedDataset:
    """What a training loop samples from: latents in memory or in files, the rest in memory."""

    latents: Tensor | LatentShards  # [all windows, C, F, h, w]
    latent_index: Tensor  # int [N], position of each window in `latents`
    latent_is_pad: Tensor  # bool [N, F - 1]
    action: Tensor  # [N, T, A] normalised
    action_is_pad: Tensor  # bool [N, T]
    proprio: Tensor  # [N, P] normalised
    prompt: Tensor  # int [N], index of the prompt
    episode: Tensor  # int [N], position in the list of episodes
    dataset_index: Tensor  # int [N], index of the dataset
    contexts: Tensor  # [prompts, L, text_dim]
    # [prompts, L], if a row of `contexts` stands for several; see `text_padding.condense_padding`
    text_bias: Tensor | None
    names: Sequence[str]  # N descriptions of where each window comes from

    def where(self, wanted: np.ndarray) -> EncodedDataset:
        """Return the windows where `wanted`, bool [N], is true."""
        index = torch.from_numpy(np.flatnonzero(wanted))
        selected = {name: getattr(self, name)[index] for name in _PER_WINDOW}
        names = [self.names[i] for i in index.tolist()]
        return dataclasses.replace(self, **selected, names=names)

    def weights(self, dataset_weights: Sequence[float]) -> Tensor | None:
        """Return the sampling weight of each window.

        Args:
            dataset_weights: Weight of each dataset, in any unit; empty: all windows are alike.

        Returns:
            float64 [N], or None if there are no weights.
        """
        if not dataset_weights:
            return None
        weight_per_dataset = torch.tensor(dataset_weights, dtype=torch.float64, device="cpu")
        # A dataset may have no window here: its weight is divided by 1 and never used.
        windows_per_dataset = torch.bincount(self.dataset_index, minlength=len(dataset_weights))
        weight_per_window = weight_per_dataset / windows_per_dataset.clamp(min=1)
        return weight_per_window[self.dataset_index]

    def batch(self, index: Tensor) -> Batch:
        """Return the windows at `index`, int [B]."""
        prompt = self.prompt[index]
        return Batch(
            latents=self.latents[self.latent_index[index]],
            context=self.contexts[prompt],
            action=self.action[index],
            proprio=self.proprio[index],
            action_is_pad=self.action_is_pad[index],
            latent_is_pad=self.latent_is_pad[index],
            text_bias=None if self.text_bias is None else self.text_bias[prompt],
        )

    def condensed(self, *, proprio: bool, dtype: torch.dtype) -> EncodedDataset:
        """Return the same windows with the padding of prompts condensed to a few biased rows.

        Args:
            proprio: Whether a proprioception token follows the prompt.
            dtype: Type that attention is computed in.
        """
        contexts, bias = condense_padding(self.contexts, proprio=proprio, dtype=dtype)
        return dataclasses.replace(self, contexts=contexts, text_bias=bias)


def encode_dataset(
    config: DataConfig,
    contract: PolicyConfig,
    dataset: Mixture,
    vae: VAE,
    prompts: PromptEmbeddings,
) -> EncodedDataset:
    """Encode and normalise a whole dataset.

    Args:
        config: Options of the run: frames, strides and cache.
        contract: Contract of the policy: cameras, action layout, normalisation and prompts.
        dataset: Dataset to encode.
        vae: Video codec.
        prompts: Embeddings of the dataset's prompts.

    Raises:
        DatasetError: The dataset is broken, or the cache holds latents of something else.
        ActionError: The recorded actions cannot be mapped onto the policy's.
        PromptError: A prompt has no embedding and there is no text encoder.
    """
    assert contract.state is not None
    windows = policy_windows(dataset, config)

    # One prompt per distinct instruction.
    instructions = dataset.instructions()
    tasks = sorted(set(instructions))
    task_index = {task: i for i, task in enumerate(tasks)}
    prompt_index = [task_index[instructions[row]] for row in windows.start]
    prompt = torch.tensor(prompt_index, dtype=torch.int64, device="cpu")
    contexts = prompts.embed(
        [contract.prompt.prompt(task) for task in tasks],
        device=torch.device("cpu"),
        dtype=torch.float32,
    )

    # Vectors: actions of whole chunks, the state at the first row.
    layout = contract.action.layout
    actions = padded_actions(dataset.actions(layout), windows, layout)
    action = contract.action.normalization.normalize(actions)
    state = dataset.states()[windows.start]
    proprio = contract.state.normalization.normalize(state)

    frame_is_pad = torch.from_numpy(windows.frame_is_pad)
    return EncodedDataset(
        latents=load_or_encode(config, contract.cameras, vae, dataset, windows),
        latent_index=torch.arange(len(windows.start), device="cpu"),
        latent_is_pad=latent_padding(frame_is_pad, vae.temporal_ratio),
        action=torch.from_numpy(action),
        action_is_pad=torch.from_numpy(windows.action_is_pad),
        proprio=torch.from_numpy(proprio),
        prompt=prompt,
        episode=torch.from_numpy(windows.episode),
        dataset_index=torch.from_numpy(dataset.dataset_index(windows.start)),
        contexts=contexts,
        text_bias=None,
        names=_window_names(dataset, windows),
    )


def _window_names(dataset: Mixture, windows: Windows) -> list[str]:
    """Return the dataset, episode and first frame of every window, in words."""
    names = []
    indices = dataset.dataset_index(windows.start)
    for index, number, row in zip(indices, windows.episode, windows.start, strict=True):
        folder = dataset.datasets[index].folder
        episode = dataset.episodes[number]
        frame = row - episode.start
        names.append(f"{folder} episode {episode.index} from frame {frame}")
    return names
