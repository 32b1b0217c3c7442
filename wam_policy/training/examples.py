"""A dataset as a training loop samples it: windows encoded once, vectors normalised, all in memory."""

# N windows, C latent channels, F latent frames, h w latent grid, T actions in a chunk, A numbers per action

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wam_policy.config import PolicyConfig
from wam_policy.errors import DatasetError
from wam_policy.hub import frozen
from wam_policy.models.objective import Batch, latent_padding
from wam_policy.models.text import Prompts
from wam_policy.models.vae import VAE
from wam_policy.training.config import RunConfig
from wam_policy.training.frames import canvases, clips
from wam_policy.training.lerobot_reader import LeRobotDataset
from wam_policy.training.windows import Windows, cut, padded_actions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Examples:
    """Everything the loop samples from, in memory."""

    latents: Tensor  # [N, C, F, h, w]
    latent_is_pad: Tensor  # bool [N, F - 1]
    action: Tensor  # [N, T, A] normalised
    action_is_pad: Tensor  # bool [N, T]
    proprio: Tensor  # [N, P] normalised
    prompt: Tensor  # int [N], index of the prompt
    contexts: Tensor  # [prompts, L, text_dim]
    names: Sequence[str]  # N: where each comes from

    def batch(self, index: Tensor) -> Batch:
        """The examples at `index` [B]."""
        return Batch(
            self.latents[index],
            self.contexts[self.prompt[index]],
            self.action[index],
            self.proprio[index],
            self.action_is_pad[index],
            self.latent_is_pad[index],
        )


@torch.no_grad()
def encode_windows(vae: VAE, dataset: LeRobotDataset, windows: Windows, config: RunConfig) -> Tensor:
    """Latents of every window's clip, [N, C, F, h, w]; read from `config.cache` if it holds exactly these."""
    digest = hashlib.sha256(dataset.fingerprint().encode())
    for name in ("config.json", f"{frozen.VAE_STEM}.safetensors"):
        digest.update((config.codec / name).read_bytes())
    digest.update(repr((config.cameras, windows.frame_rows.tolist())).encode())
    fingerprint = digest.hexdigest()
    if config.cache is not None and config.cache.is_file():
        try:
            with safe_open(config.cache, framework="pt") as file:
                if (file.metadata() or {}).get("fingerprint") == fingerprint:
                    return file.get_tensor("latents")
        except SafetensorError as error:
            raise DatasetError(f"{config.cache} can't be read ({error}); remove it") from error
        logger.warning("%s holds other windows than this run's: encoding them anew", config.cache)
    canvas, parts = canvases(dataset, config.cameras), []
    with Progress() as progress:
        for rows in progress.track(
            np.array_split(windows.frame_rows, max(1, len(windows.start) // 16)), description="encoding"
        ):
            parts.append(vae.encode(clips(canvas, rows)))
    latents = torch.cat(parts)
    if config.cache is not None:
        config.cache.parent.mkdir(parents=True, exist_ok=True)
        partial = config.cache.with_name(config.cache.name + ".partial")
        save_file({"latents": latents}, partial, metadata={"fingerprint": fingerprint})
        partial.replace(config.cache)
    return latents


def examples(config: RunConfig, contract: PolicyConfig, dataset: LeRobotDataset, vae: VAE, prompts: Prompts) -> Examples:
    """Encode and normalise the whole dataset."""
    windows = cut(
        dataset.episodes,
        horizon=contract.action.horizon,
        frames=config.frames,
        frame_stride=config.stride,
        every=config.every,
    )
    assert contract.state is not None
    sentences = dataset.instructions()
    tasks = sorted(set(sentences))
    number = {task: i for i, task in enumerate(tasks)}
    actions = padded_actions(dataset.vector("action"), windows, contract.action.layout)
    state = dataset.vector("observation.state")[windows.start]
    return Examples(
        latents=encode_windows(vae, dataset, windows, config),
        latent_is_pad=latent_padding(torch.from_numpy(windows.frame_is_pad), vae.temporal_ratio),
        action=torch.from_numpy(contract.action.normalization.normalize(actions)),
        action_is_pad=torch.from_numpy(windows.action_is_pad),
        proprio=torch.from_numpy(contract.state.normalization.normalize(state)),
        prompt=torch.tensor([number[sentences[row]] for row in windows.start]),
        contexts=prompts.embed(
            [contract.prompt.prompt(task) for task in tasks], device=torch.device("cpu"), dtype=torch.float32
        ),
        names=[
            f"episode {dataset.episodes[episode].index} from frame {row - dataset.episodes[episode].start}"
            for episode, row in zip(windows.episode, windows.start, strict=True)
        ],
    )
