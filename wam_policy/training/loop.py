"""Trains a Fast-WAM on a recorded dataset: latents are encoded once, then a plain loop over shuffled windows."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from wam_policy import normalize
from wam_policy.config import (
    ActionConfig,
    CameraConfig,
    PolicyConfig,
    PromptConfig,
    SamplingConfig,
    Source,
    StateConfig,
    VideoConfig,
)
from wam_policy.errors import DatasetError
from wam_policy.hub import frozen
from wam_policy.hub.locate import Download
from wam_policy.models.config import FastWAMConfig
from wam_policy.models.fast_wam import FastWAM
from wam_policy.models.layers import PRECISIONS
from wam_policy.models.objective import Batch, LossConfig, draw, latent_padding, training_losses
from wam_policy.models.text import Prompts, untrained_encoder
from wam_policy.models.vae import VAE
from wam_policy.models.variants import VariantName
from wam_policy.policy import WAMPolicy
from wam_policy.training import start
from wam_policy.training.frames import canvases, clips
from wam_policy.training.lerobot_reader import LeRobotDataset
from wam_policy.training.schedule import warm_cosine
from wam_policy.training.windows import Windows, cut, padded_actions

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SizeConfig:
    """Sizes of the two experts; the defaults make the embedded policy."""

    patch_size: tuple[int, int, int] = (1, 1, 1)
    video_dim: int = 128
    video_ffn_dim: int = 512
    action_expert_dim: int = 96
    action_expert_ffn_dim: int = 384
    layers: int = 6
    heads: int = 4
    head_dim: int = 32
    text_dim: int = 64
    freq_dim: int = 64


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Training of a Fast-WAM on a LeRobot dataset."""

    dataset: Path
    """LeRobot v3.0 folder with `meta/wam_contract.json` (what `wam record` writes)."""
    codec: Path
    """Folder of the video codec, in diffusers' layout."""
    out: Path
    """Folder of the run: `checkpoint/`, `curve.jsonl`."""
    init: Path | None = None
    """Folder to begin from: a policy, or what `wam convert` made of raw Wan weights; its sizes count, not `sizes`."""
    cache: Path | None = None
    """File of the encoded windows, made if it doesn't exist; None keeps them in memory only."""
    variant: VariantName = "fast"
    """What the actions see: the observed frame, the video being denoised ("joint"), or the finished video ("idm")."""
    sizes: SizeConfig = field(default_factory=SizeConfig)
    cameras: tuple[str, ...] = ("front", "wrist")
    """Cameras, in canvas order."""
    frames: int = 5
    """Pixel frames per window, the observation included."""
    stride: int = 4
    """Rows from one frame to the next; the horizon is (frames - 1) * stride actions."""
    every: int = 2
    """A window begins at every so many rows."""
    replan: int = 8
    """Actions played before the next chunk."""
    sampling_steps: int = 10
    template: str = "{task}"
    """Prompt template."""
    token_length: int = 8
    loss: LossConfig = field(default_factory=LossConfig)
    steps: int = 3000
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: int = 100
    ema: float = 0.998
    """Decay of the averaged weights, which are the ones kept."""
    clip: float = 1.0
    """Largest gradient norm."""
    seed: int = 0
    save_every: int = 1000
    """Steps between checkpoints."""
    threads: int = field(default_factory=torch.get_num_threads)
    """CPU threads."""


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


def policy_config(config: TrainConfig, dataset: LeRobotDataset, vae: VAE, given: Mapping[str, Any]) -> PolicyConfig:
    """The contract of the policy this run makes; sizes that are `given` count before the config's."""
    layout, state = dataset.action_layout(), dataset.vector("observation.state")
    sizes = {name: given.get(name, size) for name, size in dataclasses.asdict(config.sizes).items()}
    height, width = dataset.picture_size(f"observation.images.{config.cameras[0]}")
    return PolicyConfig(
        variant=config.variant,
        model=FastWAMConfig(action_dim=layout.dim, proprio_dim=state.shape[1], latent_channels=vae.mean.numel(), **sizes),
        cameras=CameraConfig(names=config.cameras, height=height, width=width),
        video=VideoConfig(frames=config.frames, stride=config.stride),
        state=StateConfig(
            names=dataset.names["observation.state"],
            normalization=normalize.Normalization(mode="min_max", statistics=normalize.statistics(state)),
        ),
        action=ActionConfig(
            layout=layout,
            normalization=normalize.Normalization(mode="min_max", statistics=normalize.statistics(dataset.vector("action"))),
            horizon=(config.frames - 1) * config.stride,
            replan=config.replan,
        ),
        prompt=PromptConfig(template=config.template, token_length=config.token_length),
        sampling=SamplingConfig(
            steps=config.sampling_steps, video_shift=config.loss.video_shift, action_shift=config.loss.action_shift
        ),
        vae=Source(subfolder="vae"),
        text=None,
    )


@torch.no_grad()
def encode_windows(vae: VAE, dataset: LeRobotDataset, windows: Windows, config: TrainConfig) -> Tensor:
    """Latents of every window's clip, [N, C, F, h, w]; read from `config.cache` if it holds exactly these."""
    digest = hashlib.sha256((config.dataset / "meta/info.json").read_bytes())
    digest.update((config.dataset / "meta/stats.json").read_bytes())
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


def examples(config: TrainConfig, contract: PolicyConfig, dataset: LeRobotDataset, vae: VAE, prompts: Prompts) -> Examples:
    """Encode and normalise the whole dataset."""
    windows = cut(
        dataset.episodes,
        horizon=contract.action.horizon,
        frames=config.frames,
        frame_stride=config.stride,
        every=config.every,
    )
    assert contract.state is not None
    tasks = sorted({episode.task for episode in dataset.episodes})
    task_of_episode = np.array([tasks.index(episode.task) for episode in dataset.episodes])
    actions = padded_actions(dataset.vector("action"), windows, contract.action.layout)
    state = dataset.vector("observation.state")[windows.start]
    return Examples(
        latents=encode_windows(vae, dataset, windows, config),
        latent_is_pad=latent_padding(torch.from_numpy(windows.frame_is_pad), vae.temporal_ratio),
        action=torch.from_numpy(contract.action.normalization.normalize(actions)),
        action_is_pad=torch.from_numpy(windows.action_is_pad),
        proprio=torch.from_numpy(contract.state.normalization.normalize(state)),
        prompt=torch.from_numpy(task_of_episode[windows.episode]),
        contexts=prompts.embed(
            [contract.prompt.prompt(task) for task in tasks], device=torch.device("cpu"), dtype=torch.float32
        ),
    )


@torch.no_grad()
def average(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the averaged weights a step towards the model's."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def train(config: TrainConfig) -> Path:
    """Train, and return the folder of the checkpoint. `curve.jsonl` holds the losses, averaged between its rows."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    dataset = LeRobotDataset(config.dataset)
    here = torch.device("cpu")
    codec = Source(subfolder=config.codec.name)
    vae = frozen.load_vae(codec, config.codec.parent, Download(), dtype=torch.float32, device=here)
    begin = None if config.init is None else start.read(config.init)
    contract = policy_config(config, dataset, vae, {} if begin is None else begin.sizes)
    texts = sorted({contract.prompt.prompt(episode.task) for episode in dataset.episodes})
    prompts = Prompts(
        {},
        token_length=config.token_length,
        text_dim=contract.model.text_dim,
        encoder=lambda: untrained_encoder(texts, contract.model.text_dim, config.seed),
    )
    data = examples(config, contract, dataset, vae, prompts)
    if len(data.latents) < config.batch_size:
        raise DatasetError(f"{len(data.latents)} windows don't fill a batch of {config.batch_size}; lower --batch-size")
    model = FastWAM(contract.model, PRECISIONS[contract.precision])
    if begin is not None:
        start.fill(model, begin)
    ema = copy.deepcopy(model).requires_grad_(False)
    logger.info("%d windows, %.2f M parameters", len(data.latents), sum(p.numel() for p in model.parameters()) / 1e6)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_cosine(step, config.steps, config.warmup))
    config.out.mkdir(parents=True, exist_ok=True)
    policy = WAMPolicy(contract, ema, vae=vae, prompts=prompts)
    sums, began = np.zeros(2), time.monotonic()
    order: Iterator[Tensor] = iter(())
    with Progress() as progress, (config.out / "curve.jsonl").open("w") as curve:
        bar = progress.add_task("training", total=config.steps)
        for step in range(1, config.steps + 1):
            index = next(order, None)
            if index is None:
                shuffled = torch.randperm(len(data.latents), generator=generator)
                order = iter(shuffled.split(config.batch_size)[: len(shuffled) // config.batch_size])
                index = next(order)
            batch = data.batch(index)
            losses = training_losses(model, batch, draw(batch, generator, config.variant), config.loss, config.variant)
            optimizer.zero_grad(set_to_none=True)
            losses.total.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            schedule.step()
            average(ema, model, min(config.ema, (1 + step) / (10 + step)))
            sums += losses.video.item(), losses.action.item()
            if step % 50 == 0 or step == config.steps:
                every = (step - 1) % 50 + 1
                row = {"step": step, "video": sums[0] / every, "action": sums[1] / every}
                row["seconds"] = round(time.monotonic() - began, 1)
                curve.write(json.dumps(row) + "\n")
                curve.flush()
                logger.info("%s", row)
                progress.update(bar, completed=step, description=f"video {row['video']:.3f} action {row['action']:.3f}")
                sums[:] = 0
            if step % config.save_every == 0 or step == config.steps:
                policy.save_pretrained(config.out / "checkpoint", dtype=torch.bfloat16)
    return config.out / "checkpoint"
