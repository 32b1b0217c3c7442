"""The options of reading and encoding a dataset."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from wam_policy.config import Family


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Windows of a LeRobot dataset, and the codec that encodes them."""

    dataset: tuple[str, ...]
    """LeRobot v2.1 or v3.0 folders or Hub ids, with `meta/wam_contract.json`, as `wam record` writes it, or of a `preset`."""
    codec: Path | None = None
    """Folder of the video codec, in diffusers' layout; the default is that of the policy a run begins from."""
    preset: str | None = None
    """What the papers trained on, "libero" or "robotwin" ("real_robot" for a Light-WAM): cameras and canvas, frames, names,
    scaling, prompts, actions played. What a preset says can't be said otherwise."""
    cache: Path | None = None
    """Folder of the encoded windows, made if it doesn't exist; None keeps them in memory only, several processes in `latents/`
    of the run: the first one encodes."""
    cameras: tuple[str, ...] = ()
    """Cameras, in canvas order; none said: those of the policy a run begins from, else front and wrist."""
    camera_map: dict[str, str] = field(default_factory=dict)
    """Where a camera is in the data: name, feature, name, feature, …; the default is `observation.images.<name>`, or that of an
    alias (`wam_policy.cameras`)."""
    frames: int = 0
    """Pixel frames per window, the observation included; 0: likewise, else 5."""
    frame_stride: int = 0
    """Rows from one frame to the next; 0: likewise, else 4. The horizon is (frames - 1) * stride actions."""
    window_stride: int = 1
    """A window begins at every so many rows."""
    num_threads: int = field(default_factory=torch.get_num_threads)
    """CPU threads."""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    """Where to compute; of several processes (`torchrun`) each takes its own."""


@dataclass(frozen=True, kw_only=True)
class CacheConfig(DataConfig):
    """Encoding of a dataset's windows before a training, which then finds them; started again, it goes on."""

    cache: Path
    """Folder of the encoded windows."""
    pretrained_path: str | Path | None = None
    """The policy that the training begins from, whose contract the windows follow: a folder, a Hub id or "embedded:<name>"."""
    family: Family = "fast_wam"
    """Whose pictures a `preset` means: the families resize them differently."""
