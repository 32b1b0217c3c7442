"""A dataset as a training loop samples it: windows encoded once, vectors normalised."""

# N windows, C latent channels, F latent frames, h w latent grid, T actions in a chunk, A numbers per action

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wam_policy.config import PolicyConfig
from wam_policy.data.config import DataConfig, resolved
from wam_policy.data.latent_cache import LatentShards, load_or_encode
from wam_policy.data.mixture import Mixture
from wam_policy.data.windows import Windows, make_windows, padded_actions
from wam_policy.models.encoders.text import PromptEmbeddings
from wam_policy.models.encoders.vae import VAE
from wam_policy.models.fast_wam.loss import Batch, latent_padding
from wam_policy.models.layers.text_padding import condense_padding
from wam_policy.training.config import RunConfig


@dataclass(frozen=True)
class EncodedDataset:
    """Everything the loop samples from: latents in memory or in files, the rest in memory."""

    latents: Tensor | LatentShards  # [windows, C, F, h, w]
    row: Tensor  # int [N], each example's place in them
    latent_is_pad: Tensor  # bool [N, F - 1]
    action: Tensor  # [N, T, A] normalised
    action_is_pad: Tensor  # bool [N, T]
    proprio: Tensor  # [N, P] normalised
    prompt: Tensor  # int [N], index of the prompt
    episode: Tensor  # int [N], position in the list of episodes
    part: Tensor  # int [N], which dataset it is of
    contexts: Tensor  # [prompts, L, text_dim]
    text_bias: Tensor | None  # [prompts, L]; see `padding.condensed`
    names: Sequence[str]  # N: where each comes from

    def where(self, wanted: np.ndarray) -> EncodedDataset:
        """The examples where `wanted`, bool [N], is true."""
        index = torch.from_numpy(np.flatnonzero(wanted))
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        picked = {
            name: x[index]
            for name, x in parts.items()
            if name not in ("latents", "contexts", "text_bias", "names")
        }
        return dataclasses.replace(self, **picked, names=[self.names[i] for i in index.tolist()])

    def weights(self, parts: Sequence[float]) -> Tensor | None:
        """How often each example is to be drawn, [N], so that datasets are as often as `parts` say; None: all alike."""
        if not parts:
            return None
        counts = torch.bincount(self.part, minlength=len(parts)).clamp(min=1)
        return (torch.tensor(parts, dtype=torch.float64) / counts)[self.part]

    def batch(self, index: Tensor) -> Batch:
        """The examples at `index` [B]."""
        return Batch(
            self.latents[self.row[index]],
            self.contexts[self.prompt[index]],
            self.action[index],
            self.proprio[index],
            self.action_is_pad[index],
            self.latent_is_pad[index],
            None if self.text_bias is None else self.text_bias[self.prompt[index]],
        )

    def condensed(self, *, proprio: bool, dtype: torch.dtype) -> EncodedDataset:
        """The same examples, the prompts' padding as a few rows that count for all of it."""
        contexts, bias = condense_padding(self.contexts, proprio=proprio, dtype=dtype)
        return dataclasses.replace(self, contexts=contexts, text_bias=bias)


def windows_of(config: DataConfig, dataset: Mixture) -> Windows:
    """The windows of a dataset."""
    frames = resolved(config.frames)
    frame_stride = resolved(config.frame_stride)
    return make_windows(
        dataset.episodes,
        horizon=(frames - 1) * frame_stride,
        frames=frames,
        frame_stride=frame_stride,
        window_stride=config.window_stride,
    )


def encode_dataset(
    config: RunConfig, contract: PolicyConfig, dataset: Mixture, vae: VAE, prompts: PromptEmbeddings
) -> EncodedDataset:
    """Encode and normalise the whole dataset."""
    windows = windows_of(config, dataset)
    assert contract.state is not None
    sentences, parts = dataset.instructions(), dataset.dataset_of(windows.start)
    tasks = sorted(set(sentences))
    number = {task: i for i, task in enumerate(tasks)}
    actions = padded_actions(dataset.vector("action"), windows, contract.action.layout)
    state = dataset.vector("observation.state")[windows.start]
    return EncodedDataset(
        latents=load_or_encode(config, contract.cameras, vae, dataset, windows),
        row=torch.arange(len(windows.start)),
        latent_is_pad=latent_padding(torch.from_numpy(windows.frame_is_pad), vae.temporal_ratio),
        action=torch.from_numpy(contract.action.normalization.normalize(actions)),
        action_is_pad=torch.from_numpy(windows.action_is_pad),
        proprio=torch.from_numpy(contract.state.normalization.normalize(state)),
        prompt=torch.tensor([number[sentences[row]] for row in windows.start]),
        episode=torch.from_numpy(windows.episode),
        part=torch.from_numpy(parts),
        contexts=prompts.embed(
            [contract.prompt.prompt(task) for task in tasks],
            device=torch.device("cpu"),
            dtype=torch.float32,
        ),
        text_bias=None,
        names=[
            f"{dataset.parts[part].folder} episode {dataset.episodes[episode].index} "
            f"from frame {row - dataset.episodes[episode].start}"
            for part, episode, row in zip(parts, windows.episode, windows.start, strict=True)
        ],
    )
