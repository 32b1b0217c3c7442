"""The options for reading and encoding a dataset."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from wam_policy.config import Family


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Windows of a LeRobot dataset, and the codec that encodes them."""

    dataset: tuple[str, ...]
    """LeRobot v2.1 or v3.0 datasets, as folders or Hub ids. Each needs `meta/wam_contract.json`, as
    `wam record` writes it, or a `preset`."""
    codec: Path | None = None
    """Folder of the video codec in diffusers' layout; by default that of the initial policy."""
    preset: str | None = None
    """Dataset of the papers: "libero" or "robotwin" ("real_robot" for a Light-WAM). It sets
    cameras, canvas, frames, names, normalisation, prompts and replanning; do not set these too."""
    cache: Path | None = None
    """Folder for the encoded windows, created if it does not exist. None keeps them in memory; with
    several processes the first one encodes them into `latents/` of the run."""
    cameras: tuple[str, ...] = ()
    """Cameras in canvas order; by default those of the initial policy, or else front and wrist."""
    camera_map: dict[str, str] = field(default_factory=dict)
    """Features that hold the cameras: NAME FEATURE NAME FEATURE …; by default
    `observation.images.<name>`, or that of an alias of the name (`wam_policy.cameras`)."""
    frames: int = 0
    """Pixel frames per window, the observation included; 0: as the initial policy, or else 5."""
    frame_stride: int = 0
    """Rows from one frame to the next; 0: as the initial policy, or else 4. The horizon is
    (frames - 1) * frame_stride actions."""
    window_stride: int = 1
    """Rows from the start of one window to the start of the next."""
    num_threads: int = field(default_factory=torch.get_num_threads)
    """CPU threads."""
    device: str = field(default_factory=_default_device)
    """Device to compute on; with several processes (`torchrun`) each takes its own."""


@dataclass(frozen=True, kw_only=True)
class CacheConfig(DataConfig):
    """Encoding of a dataset's windows before training; an interrupted run resumes."""

    cache: Path
    """Folder for the encoded windows."""
    pretrained_path: str | Path | None = None
    """Policy that training will start from and whose contract the windows follow: a folder, a Hub
    id or "embedded:<name>"."""
    family: Family = "fast_wam"
    """Policy family that a `preset` is meant for: the families resize camera frames differently."""
