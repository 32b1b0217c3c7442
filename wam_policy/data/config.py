"""The options of reading and encoding a dataset."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from wam_policy.config import Family
from wam_policy.errors import ConfigError

T = TypeVar("T")

# Features of the state and of the actions in LeRobot's own recordings.
STATE_KEY = ("observation.state",)
ACTION_KEY = ("action",)


def check_positive(config: object, names: Iterable[str]) -> None:
    """Check that the options of these names are at least 1 where they are set.

    Raises:
        ConfigError: One is not.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(
                f"`{name}` must be positive, got {value}; leave it out for the default"
            )


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Windows of a LeRobot dataset, and the codec that encodes them."""

    dataset: tuple[str, ...]
    """LeRobot v2 or v3 folders or Hub ids. Each holds `meta/wam_contract.json`, which
    `wam record` writes, unless `preset` is set."""
    codec: Path | None = None
    """Folder of the video codec in the diffusers layout; default: the codec of the policy that
    `pretrained_path` names."""
    preset: str | None = None
    """Dataset of the papers: "libero", "robotwin" or, for a Light-WAM, "real_robot". It sets
    cameras, canvas, frames, names, normalisation, prompts, denoising steps and the actions executed
    before the next chunk; these options must not be set to other values."""
    cache: Path | None = None
    """Folder of the encoded windows, created if it does not exist. Default: the windows stay in
    memory; a run of several processes writes them to `latents/` in its output folder."""
    cameras: tuple[str, ...] | None = None
    """Cameras in canvas order; default: those of the pretrained policy, else front and wrist."""
    camera_map: dict[str, str] = field(default_factory=dict)
    """Dataset feature of each camera: name, feature, name, feature, …; default:
    `observation.images.<name>`, or the feature of an alias of the camera (`wam_policy.cameras`)."""
    state_key: tuple[str, ...] = STATE_KEY
    """Dataset features whose numbers, one feature after the other, are the state."""
    action_key: tuple[str, ...] = ACTION_KEY
    """Dataset features whose numbers, one feature after the other, are an action."""
    frames: int | None = None
    """Video frames per window, the observation included; default: as the pretrained policy,
    else 5."""
    frame_stride: int | None = None
    """Dataset rows from one frame to the next; default: as the pretrained policy, else 4. The
    action horizon is (frames - 1) * frame_stride."""
    window_stride: int = 1
    """Dataset rows from the start of one window to the start of the next."""
    num_threads: int = field(default_factory=torch.get_num_threads)
    """CPU threads."""
    device: str = field(default_factory=_default_device)
    """Device to compute on; each of several processes (`torchrun`) takes its own."""

    def __post_init__(self) -> None:
        check_positive(self, ("frames", "frame_stride", "window_stride", "num_threads"))
        for name in ("cameras", "state_key", "action_key"):
            if getattr(self, name) == ():
                raise ConfigError(f"`{name}` is empty: name at least one, or leave it out")


@dataclass(frozen=True, kw_only=True)
class CacheConfig(DataConfig):
    """Encoding of a dataset before a training run; a command that was stopped can be repeated."""

    cache: Path = field()  # no default: here it is required
    """Folder of the encoded windows."""
    pretrained_path: str | Path | None = None
    """Policy that the training run starts from, whose contract the windows follow: a folder, a Hub
    id or "embedded:<name>"."""
    family: Family = "fast_wam"
    """Model family that a `preset` is for; the families resize images differently."""


def resolved(value: T | None) -> T:
    """Return the value of an option that `wam_policy.training.resolve` has filled in.

    Raises:
        ConfigError: The option is still unset.
    """
    if value is None:
        raise ConfigError(
            "an option is still unset: call `resolve.inherit_from_policy` on the config first"
        )
    return value
