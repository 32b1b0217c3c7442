"""Latents of a recording's windows, encoded once: in memory, or in files that are mapped and whose writing can go on."""

# N windows, F pixel frames of a window, C latent channels, f latent frames, h w latent grid

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wam_policy import images
from wam_policy.config import CameraConfig
from wam_policy.data.config import DataConfig
from wam_policy.data.mixture import Mixture
from wam_policy.data.windows import Windows
from wam_policy.errors import DatasetError
from wam_policy.hub import components
from wam_policy.models.encoders.vae import VAE
from wam_policy.utils.io import locked

BATCH = 16  # windows that are encoded at once
SHARD = 512  # windows per file, or a few more: an episode's stay together


class LatentShards:
    """Latents in files, read where they are asked for."""

    def __init__(self, folder: Path, counts: list[int]) -> None:
        self.folder, self.starts = folder, np.cumsum([0, *counts])
        self._files: dict[int, Any] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: Tensor) -> Tensor:
        """Latents [B, C, f, h, w] at `index` [B]."""
        shards = np.searchsorted(self.starts, index.numpy(), side="right") - 1
        pairs = zip(index.tolist(), shards.tolist(), strict=True)
        return torch.stack([self._slice(shard)[i - int(self.starts[shard])] for i, shard in pairs])

    def _slice(self, shard: int) -> Any:
        if shard not in self._files:
            self._files[shard] = safe_open(_path(self.folder, shard), framework="pt")
        return self._files[shard].get_slice("latents")


def _path(folder: Path, shard: int) -> Path:
    return folder / f"shard_{shard:05}.safetensors"


def codec_fingerprint(codec: Path) -> str:
    """SHA-256 of a codec's config and weights."""
    digest = hashlib.sha256((codec / "config.json").read_bytes())
    for path in sorted(codec.glob(f"{components.VAE_STEM}*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def fingerprint(
    config: DataConfig, cameras: CameraConfig, dataset: Mixture, windows: Windows
) -> str:
    """SHA-256 of what latents depend on: the recording, the codec, the canvas, the frames of each window."""
    assert config.codec is not None
    digest = hashlib.sha256((dataset.fingerprint() + codec_fingerprint(config.codec)).encode())
    places = sorted(dataset.camera_map.items())
    digest.update(repr((cameras, windows.frame_rows.shape, *([places] if places else []))).encode())
    digest.update(windows.frame_rows.tobytes())
    return digest.hexdigest()


def load_or_encode(
    config: DataConfig, cameras: CameraConfig, vae: VAE, dataset: Mixture, windows: Windows
) -> Tensor | LatentShards:
    """Latents of every window's clip, [N, C, f, h, w]: from `config.cache` if they are there, else encoded now, into it.

    Raises:
        DatasetError: the cache holds latents of other data, another codec, canvas or stride, or can't be read.
    """
    total = len(windows.start)
    if config.cache is None:
        with Progress() as progress:
            bar = progress.add_task("encoding", total=total)
            return torch.cat(
                [
                    latents
                    for _, latents in _encode(vae, cameras, dataset, windows, 0, progress, bar)
                ]
            )
    key = fingerprint(config, cameras, dataset, windows)
    with locked(config.cache, wait=True):  # for a run that is filling it
        return _filled(config.cache, key, cameras, vae, dataset, windows)


def _filled(
    folder: Path, key: str, cameras: CameraConfig, vae: VAE, dataset: Mixture, windows: Windows
) -> LatentShards:
    """The shards of a folder that no other run writes into, those that are lacking encoded now."""
    total, counts = len(windows.start), list[int]()
    while _path(folder, len(counts)).is_file():
        counts.append(_count(_path(folder, len(counts)), key))
    if sum(counts) < total:
        waiting: list[Tensor] = []
        with Progress() as progress:
            bar = progress.add_task("encoding", total=total, completed=sum(counts))
            for stop, latents in _encode(
                vae, cameras, dataset, windows, sum(counts), progress, bar
            ):
                waiting.append(latents)
                if sum(map(len, waiting)) >= SHARD or stop == total:
                    counts.append(_write(_path(folder, len(counts)), torch.cat(waiting), key))
                    waiting.clear()
    return LatentShards(folder, counts)


def _count(path: Path, key: str) -> int:
    """Windows of a shard that was made of the same data."""
    try:
        with safe_open(path, framework="pt") as file:
            theirs: Mapping[str, str] = file.metadata() or {}
            if theirs.get("fingerprint") != key:
                raise DatasetError(
                    f"{path.parent} holds latents of another dataset, codec, canvas or stride: remove it, or choose "
                    f"another --cache"
                )
            return int(file.get_slice("latents").get_shape()[0])
    except SafetensorError as error:
        raise DatasetError(f"{path} can't be read ({error}); remove it") from error


def _write(path: Path, latents: Tensor, key: str) -> int:
    partial = path.with_name(path.name + ".partial")
    try:
        save_file({"latents": latents.contiguous()}, partial, metadata={"fingerprint": key})
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise DatasetError(
            f"{path} can't be written ({error}): make room and start again, what is there is kept"
        ) from error
    return len(latents)


@torch.no_grad()
def _encode(
    vae: VAE,
    cameras: CameraConfig,
    dataset: Mixture,
    windows: Windows,
    start: int,
    progress: Progress,
    bar: Any,
) -> Iterator[tuple[int, Tensor]]:
    """Latents of the windows from `start` on, an episode at a time, and the window after them."""
    weight = next(vae.parameters())
    while start < len(windows.start):
        number = int(windows.episode[start])
        stop = int(np.searchsorted(windows.episode, number, side="right"))
        rows, places = np.unique(windows.frame_rows[start:stop], return_inverse=True)
        seen = {
            name: dataset.pictures(name, dataset.episodes[number], rows) for name in cameras.names
        }
        canvas = torch.from_numpy(images.canvas(seen, cameras))
        clips = torch.from_numpy(places.reshape(stop - start, -1))
        parts = []
        for part in clips.split(BATCH):
            parts.append(vae.encode(canvas[part].transpose(1, 2).to(weight)).cpu())
            progress.advance(bar, len(part))
        yield stop, torch.cat(parts)
        start = stop
