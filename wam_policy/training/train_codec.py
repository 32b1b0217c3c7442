"""Trains a small `AutoencoderKLWan` on the clips of a dataset, for policies with such a codec."""

# B clips, F frames, H W pixels

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from wam_policy import images
from wam_policy.data.config import check_positive
from wam_policy.data.lerobot_reader import CAMERA_PREFIX, LeRobotDataset
from wam_policy.data.windows import Windows, make_windows
from wam_policy.errors import DatasetError
from wam_policy.hub import components, weights
from wam_policy.models.encoders.vae import VAE, build_vae
from wam_policy.training.optimizer import warmup_cosine
from wam_policy.utils.io import replace_files

logger = logging.getLogger(__name__)

# Downsamples 16 times in space and 4 times in time, as Wan2.2's codec, with 1.7 M parameters.
TINY: dict[str, Any] = {
    "base_dim": 24,
    "z_dim": 48,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "is_residual": True,
    "patch_size": 4,
    "in_channels": 48,
    "out_channels": 48,
    "scale_factor_spatial": 16,
    "scale_factor_temporal": 4,
}

WARMUP_STEPS = 30
LOGGING_STEPS = 20
STATISTICS_CLIPS = 512  # clips that the latent statistics are computed from
MEAN_IMAGE_FRAMES = 1000  # the mean image uses at least this many frames, or all there are


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """Training of a small video codec on the clips of a dataset."""

    dataset: Path
    """LeRobot v2.1 or v3.0 folder."""
    output_dir: Path
    """Folder of the trained codec, in the diffusers layout."""
    cameras: tuple[str, ...] = ("front", "wrist")
    """Cameras in canvas order."""
    frames: int = 5
    """Video frames per clip."""
    frame_stride: int = 4
    """Dataset rows from one frame to the next."""
    pretrained_path: Path | None = None
    """Folder of a codec to start from; default: random weights."""
    steps: int = 600
    """Updates of the weights."""
    batch_size: int = 8
    """Clips per update."""
    learning_rate: float = 2e-3
    """Highest learning rate."""
    kl_weight: float = 1e-6
    """Weight of the KL divergence of the posterior from a standard normal distribution."""
    foreground_weight: float = 4.0
    """Additional loss weight of pixels that differ from the dataset's mean image, so that small
    moving objects count."""
    seed: int = 0
    """Seed of the weights and of the clips."""
    num_threads: int = field(default_factory=torch.get_num_threads)
    """CPU threads."""

    def __post_init__(self) -> None:
        check_positive(self, ("frames", "frame_stride", "steps", "batch_size", "num_threads"))


def codec_loss(vae: VAE, video: Tensor, weight: Tensor, kl_weight: float) -> tuple[Tensor, Tensor]:
    """Compute the training loss of a codec.

    Args:
        vae: The codec.
        video: Clips [B, 3, F, H, W] in [-1, 1].
        weight: Weight of each pixel, [B, 1, F, H, W].
        kl_weight: Weight of the KL divergence from a standard normal distribution.

    Returns:
        The weighted absolute error plus the KL divergence, and the plain mean absolute error.
    """
    posterior = vae.model.encode(video).latent_dist
    reconstruction = vae.model.decode(posterior.sample()).sample
    error = (reconstruction - video).abs()
    loss = (error * weight).mean() + kl_weight * posterior.kl().mean()
    return loss, error.mean()


@torch.no_grad()
def latent_statistics(
    vae: VAE, canvas: np.ndarray, rows: np.ndarray, batch_size: int
) -> tuple[list[float], list[float]]:
    """Compute mean and standard deviation of each raw latent channel.

    Args:
        vae: The codec.
        canvas: Canvas of every frame, from `canvases`.
        rows: Frame numbers of the clips, int [clips, F].
        batch_size: Smallest number of clips to encode at once.
    """
    latents = []
    for part in np.array_split(rows, max(1, len(rows) // batch_size)):
        posterior = vae.model.encode(clips(canvas, part)).latent_dist
        latents.append(posterior.mode())
    values = torch.cat(latents).transpose(0, 1).flatten(1)  # [channels, values]
    return values.mean(1).tolist(), values.std(1).tolist()


def train_codec(config: CodecConfig, architecture: dict[str, Any] = TINY) -> Path:
    """Train a codec and write it with the statistics of its latents, and its loss curve.

    Args:
        config: Options of the training.
        architecture: Options of diffusers' `AutoencoderKLWan`.

    Returns:
        `config.output_dir`.

    Raises:
        DatasetError: The dataset is broken, or lacks a camera.
        CheckpointError: The folder cannot be written; an older codec in it is unchanged.
    """
    torch.set_num_threads(config.num_threads)
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)

    # Every frame is decoded into memory once, which suits small datasets.
    dataset = LeRobotDataset(config.dataset)
    canvas = canvases(dataset, config.cameras)
    windows = make_windows(
        dataset.episodes, horizon=1, frames=config.frames, frame_stride=config.frame_stride
    )
    vae = _build_codec(config, architecture)
    curve = _fit(config, vae, canvas, windows, rng)

    # The saved codec normalises its latents by their statistics.
    rows = windows.frame_rows[rng.integers(len(windows.start), size=STATISTICS_CLIPS)]
    vae.eval()
    mean, std = latent_statistics(vae, canvas, rows, config.batch_size)
    trained = build_vae({**architecture, "latents_mean": mean, "latents_std": std})
    trained.model.load_state_dict(vae.model.state_dict())
    lines = [json.dumps(row) + "\n" for row in curve]
    with replace_files(config.output_dir, "config.json") as stage:
        trained.model.save_pretrained(stage)
        (stage / "curve.jsonl").write_text("".join(lines), encoding="utf-8")
    return config.output_dir


def _build_codec(config: CodecConfig, architecture: dict[str, Any]) -> VAE:
    """Build the codec with random or pretrained weights, and latents that are not normalised."""
    channels = architecture["z_dim"]
    identity = {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}
    vae = build_vae({**architecture, **identity})
    if config.pretrained_path is not None:
        weights.load_weights(
            vae.model,
            config.pretrained_path,
            components.VAE_STEM,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
    return vae


def _fit(
    config: CodecConfig,
    vae: VAE,
    canvas: np.ndarray,
    windows: Windows,
    rng: np.random.Generator,
) -> list[dict[str, Any]]:
    """Train a codec; return the rows of its loss curve.

    Args:
        config: Options of the training.
        vae: Codec; changed.
        canvas: Canvas of every frame, from `canvases`.
        windows: Clips to sample from.
        rng: Source of the sampled clips.
    """
    # Pixels are weighted by their distance from the mean image, which shows the background.
    mean_image = _mean_image(canvas)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, config.steps, WARMUP_STEPS)
    )

    curve: list[dict[str, Any]] = []
    start_time = time.monotonic()
    with Progress() as progress:
        bar = progress.add_task("codec", total=config.steps)
        for step in range(config.steps):
            index = rng.integers(len(windows.start), size=config.batch_size)
            video = clips(canvas, windows.frame_rows[index])
            foreground = (video - mean_image).abs().amax(1, keepdim=True)
            weight = 1 + config.foreground_weight * foreground

            # Update the weights.
            loss, error = codec_loss(vae, video, weight, config.kl_weight)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            schedule.step()

            # A row of the curve every few steps and after the last one.
            if step % LOGGING_STEPS == 0 or step == config.steps - 1:
                seconds = round(time.monotonic() - start_time)
                row = {"step": step, "l1": error.item(), "loss": loss.item(), "s": seconds}
                curve.append(row)
                description = f"codec l1 {row['l1']:.3f}"
                progress.update(bar, completed=step + 1, description=description)
                logger.info("%s", row)
    return curve


def _mean_image(canvas: np.ndarray) -> Tensor:
    """Return the mean of evenly spaced frames, float [3, 1, H, W] in [-1, 1]."""
    stride = max(1, len(canvas) // MEAN_IMAGE_FRAMES)
    frames = images.to_model_range(canvas[::stride])
    return torch.from_numpy(frames.mean(0)).unsqueeze(1)


def canvases(dataset: LeRobotDataset, cameras: tuple[str, ...]) -> np.ndarray:
    """Return the canvas of every frame, uint8 [frames, H, W, 3] with the cameras side by side.

    Args:
        dataset: Recording, which is decoded into memory.
        cameras: Cameras in canvas order.

    Raises:
        DatasetError: The dataset lacks a camera.
    """
    keys = [CAMERA_PREFIX + name for name in cameras]
    available = [key.removeprefix(CAMERA_PREFIX) for key in dataset.cameras]
    missing = [name for name in cameras if name not in available]
    if missing:
        raise DatasetError(
            f"{dataset.folder} has no cameras {missing}; choose --cameras from {available}"
        )
    return images.compose([dataset.read_all_frames(key) for key in keys], "row")


def clips(canvas: np.ndarray, rows: np.ndarray) -> Tensor:
    """Return clips, float [B, 3, F, H, W] in [-1, 1].

    Args:
        canvas: Canvas of every frame, from `canvases`.
        rows: Frame numbers, int [B, F].
    """
    frames = images.to_model_range(canvas[rows])
    return torch.from_numpy(frames).movedim(1, 2).contiguous()
