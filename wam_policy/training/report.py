"""What a finished run shows: its curves, imagined beside real futures, and the notes of its card."""

# B samples, F frames of a clip, H W pixels, C latent channels, f latent frames, h w latent grid

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wam_policy import images
from wam_policy.errors import MissingExtraError
from wam_policy.evaluation.metrics import psnr_over
from wam_policy.models.encoders.vae import VAE
from wam_policy.training.config import LightTrainConfig, TrainConfig
from wam_policy.utils.environment import commit
from wam_policy.utils.io import write_bytes

PANELS = {
    "losses": ("video", "action", "val_video", "val_action"),
    "action error": ("val_error",),
    "PSNR, dB": ("val_psnr",),
}


@torch.no_grad()
def decode_clips(vae: VAE, latents: Tensor) -> np.ndarray:
    """Latents [B, C, f, h, w] as the codec shows them, uint8 [B, F, H, W, 3]."""
    return images.to_pixels(vae.decode(latents.to(vae.mean.device)).float().cpu().numpy())


def video_psnr(real: np.ndarray, imagined: np.ndarray) -> float:
    """PSNR of the frames after the first, uint8 [B, F, H, W, 3], in dB, at most 100."""
    return psnr_over([(real[:, 1:], imagined[:, 1:])])


def contact_sheet(
    real: np.ndarray, imagined: np.ndarray, path: Path, *, narrowest: int = 96
) -> None:
    """Write clips, uint8 [B, F, H, W, 3], as one picture: a row of real frames, below it the same as imagined, and so on."""
    rows = [
        np.concatenate(list(clip), axis=1)
        for pair in zip(real, imagined, strict=True)
        for clip in pair
    ]
    sheet = Image.fromarray(np.concatenate(rows))
    factor = max(1, -(-narrowest // real.shape[2]))
    large = sheet.resize((sheet.width * factor, sheet.height * factor), Image.Resampling.NEAREST)
    _write(path, lambda file: large.save(file, "PNG"))


def plot_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the rows of a `curve.jsonl`: losses, what was measured on held-out episodes, and success.

    Raises:
        MissingExtraError: matplotlib isn't installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "train") from error
    found = {name for row in rows for name in row}
    panels = PANELS | {
        "success": tuple(sorted(name for name in found if name.startswith("success_")))
    }
    shown = {title: [name for name in names if name in found] for title, names in panels.items()}
    shown = {title: names for title, names in shown.items() if names}
    figure = Figure(figsize=(5 * len(shown), 3.5), layout="constrained")
    for axis, (title, names) in zip(
        figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True
    ):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            axis.plot(*zip(*points, strict=True), ".-" if len(points) < 30 else "-", label=name)
        axis.set(title=title, xlabel="step", yscale="log" if title == "losses" else "linear")
        axis.grid(alpha=0.3)
        axis.legend()
    _write(path, lambda file: figure.savefig(file, format="png", dpi=110))


def _write(path: Path, draw: Callable[[io.BytesIO], object]) -> None:
    """Write what is drawn, whole or not at all."""
    file = io.BytesIO()
    draw(file)
    write_bytes(path, file.getvalue())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a `curve.jsonl`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def card_notes(
    config: TrainConfig | LightTrainConfig, facts: dict[str, Any], rows: list[dict[str, Any]]
) -> str:
    """The end of a checkpoint's card: what it was trained on, how, and what was measured."""
    optimizer, latest = (
        config.optimizer,
        {name: value for row in rows for name, value in row.items()},
    )
    command = "train" if isinstance(config, TrainConfig) else "train-light"
    begun = config.pretrained_path if isinstance(config, TrainConfig) else (config.pretrained_path,)
    data = ", ".join(f"`{Path(name).name}`" for name in config.dataset)
    schedule = f"AdamW at {optimizer.learning_rate:g}, betas {optimizer.betas[0]:g} and {optimizer.betas[1]:g}, decay "
    schedule += f"{optimizer.weight_decay:g}" + (
        f", averaged with {optimizer.ema_decay:g}" if optimizer.ema_decay else ""
    )
    lines = {
        "Data": f"{data} (sha256 `{facts['dataset_sha256'][:16]}`)",
        "Begun from": ", ".join(
            f"`{Path(one).name if Path(one).exists() else one}`" for one in begun
        )
        or "random weights",
        "Updates": f"{latest['step']} of {config.batch_size} windows, {schedule}, {config.compute_dtype}",
    }
    if isinstance(config, TrainConfig) and config.trainable != "all":
        lines["Trained"] = {"lora": f"LoRA of rank {config.lora_rank}, merged"}.get(
            config.trainable, config.trainable
        )
    lines["Losses"] = f"video {latest['video']:.4g}, action {latest['action']:.4g}"
    if "val_error" in latest:
        held = f"{config.validation_fraction:.0%} of the episodes held out: video {latest['val_video']:.4g}, action "
        held += f"{latest['val_action']:.4g}, mean action error {latest['val_error']:.3g}"
        lines["Validation"] = held + (
            f", video PSNR {latest['val_psnr']:.1f} dB" if "val_psnr" in latest else ""
        )
    if success := {name: value for name, value in latest.items() if name.startswith("success_")}:
        played = (f"{name.removeprefix('success_')} {value:.0%}" for name, value in success.items())
        lines[f"Success in {config.eval_env}"] = ", ".join(played)
    lines["Code"] = f"`wam {command}`" + (f", commit `{made[:7]}`" if (made := commit()) else "")
    table = "\n".join(f"| {name} | {text} |" for name, text in lines.items())
    return f"## Training\n\n| | |\n|---|---|\n{table}\n"
