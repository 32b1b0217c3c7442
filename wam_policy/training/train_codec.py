"""Trains a small `AutoencoderKLWan` on the clips of a dataset, for policies that bring their own codec."""

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
from wam_policy.data.lerobot_reader import LeRobotDataset
from wam_policy.data.windows import make_windows
from wam_policy.errors import DatasetError
from wam_policy.hub import components, weights
from wam_policy.models.encoders.vae import VAE, build_vae
from wam_policy.training.optimizer import warmup_cosine

logger = logging.getLogger(__name__)

TINY: dict[str, Any] = {  # 16× in space and 4× in time, as Wan2.2's, at 1.7 M parameters
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


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """Training of a small video codec on a dataset's clips."""

    dataset: Path
    """LeRobot v3.0 folder."""
    output_dir: Path
    """Folder of the trained codec, in diffusers' layout."""
    cameras: tuple[str, ...] = ("front", "wrist")
    """Cameras, in canvas order."""
    frames: int = 5
    """Pixel frames per clip."""
    frame_stride: int = 4
    """Rows from one frame to the next."""
    pretrained_path: Path | None = None
    """Folder of a codec to go on from."""
    steps: int = 600
    batch_size: int = 8
    learning_rate: float = 2e-3
    kl_weight: float = 1e-6
    """Weight of the posterior's divergence from a standard normal."""
    foreground_weight: float = 4.0
    """How much more a pixel counts that differs from the dataset's mean picture: small things that move matter."""
    seed: int = 0
    num_threads: int = field(default_factory=torch.get_num_threads)
    """CPU threads."""


def codec_loss(vae: VAE, video: Tensor, weight: Tensor, kl_weight: float) -> tuple[Tensor, Tensor]:
    """Weighted absolute error plus divergence, and the plain mean absolute error."""
    posterior = vae.model.encode(video).latent_dist
    error = (vae.model.decode(posterior.sample()).sample - video).abs()
    return (error * weight).mean() + kl_weight * posterior.kl().mean(), error.mean()


@torch.no_grad()
def latent_statistics(
    vae: VAE, canvas: np.ndarray, rows: np.ndarray, batch_size: int
) -> tuple[list[float], list[float]]:
    """Mean and deviation of each raw latent channel over the clips at `rows`."""
    latents = [
        vae.model.encode(clips(canvas, part)).latent_dist.mode()
        for part in np.array_split(rows, len(rows) // batch_size)
    ]
    values = torch.cat(latents).transpose(0, 1).flatten(1)
    return values.mean(1).tolist(), values.std(1).tolist()


def train_codec(config: CodecConfig, architecture: dict[str, Any] = TINY) -> Path:
    """Train the codec, write it to `config.out` with the latent statistics in its config, and its curve beside it."""
    torch.set_num_threads(config.num_threads)
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    dataset = LeRobotDataset(config.dataset)
    canvas = canvases(dataset, config.cameras)
    windows = make_windows(
        dataset.episodes, horizon=1, frames=config.frames, frame_stride=config.frame_stride
    )
    mean_picture = torch.from_numpy(
        images.to_model_range(canvas[:: max(1, len(canvas) // 1000)]).mean(0)
    ).unsqueeze(1)
    channels = architecture["z_dim"]
    vae = build_vae(
        {**architecture, "latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}
    )
    if config.pretrained_path is not None:
        weights.load_weights(
            vae.model,
            config.pretrained_path,
            components.VAE_STEM,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, config.steps, 30)
    )
    curve, began = [], time.monotonic()
    with Progress() as progress:
        bar = progress.add_task("codec", total=config.steps)
        for step in range(config.steps):
            video = clips(
                canvas, windows.frame_rows[rng.integers(len(windows.start), size=config.batch_size)]
            )
            weight = 1 + config.foreground_weight * (video - mean_picture).abs().amax(
                1, keepdim=True
            )
            loss, error = codec_loss(vae, video, weight, config.kl_weight)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 20 == 0 or step == config.steps - 1:
                curve.append(
                    {
                        "step": step,
                        "l1": error.item(),
                        "loss": loss.item(),
                        "s": round(time.monotonic() - began),
                    }
                )
                progress.update(
                    bar, completed=step + 1, description=f"codec l1 {curve[-1]['l1']:.3f}"
                )
                logger.info("%s", curve[-1])
    rows = windows.frame_rows[rng.integers(len(windows.start), size=512)]
    vae.eval()
    mean, std = latent_statistics(vae, canvas, rows, config.batch_size)
    trained = build_vae({**architecture, "latents_mean": mean, "latents_std": std})
    trained.model.load_state_dict(vae.model.state_dict())
    trained.model.save_pretrained(config.output_dir)
    (config.output_dir / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in curve))
    return config.output_dir


def canvases(dataset: LeRobotDataset, cameras: tuple[str, ...]) -> np.ndarray:
    """Every frame's canvas, uint8 [frames, H, ΣW, 3], in memory."""
    missing = [name for name in cameras if f"observation.images.{name}" not in dataset.cameras]
    if missing:
        raise DatasetError(f"{dataset.folder} has no cameras {missing}; it has {dataset.cameras}")
    return images.compose([dataset.frames(f"observation.images.{name}") for name in cameras], "row")


def clips(canvas: np.ndarray, rows: np.ndarray) -> Tensor:
    """Frames of windows, float [B, 3, F, H, W] in [-1, 1], from canvases and row numbers [B, F]."""
    return torch.from_numpy(images.to_model_range(canvas[rows])).movedim(1, 2).contiguous()
