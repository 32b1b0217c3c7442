"""Reads a policy of any format: our own, a file of the reference implementation, a folder of LeRobot's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from wam_policy.config import DtypeName, PolicyConfig
from wam_policy.errors import CheckpointError, ConfigError, WeightsError
from wam_policy.hub import checkpoint, foreign, lerobot, lightwam, statistics, weights
from wam_policy.hub.checkpoint import Parts
from wam_policy.hub.foreign import Foreign
from wam_policy.hub.locate import Download, locate
from wam_policy.hub.sizes import sizes
from wam_policy.models.config import FastWAMConfig, LightWAMConfig
from wam_policy.presets import PRESETS, RELEASES, Trained, contract, preset_of

STATISTICS = "dataset_stats.json"


@dataclass(frozen=True)
class Wanted:
    """What is to be read, and what its files don't say."""

    place: str | Path  # folder, file, or Hub id
    filename: str | None = None  # of a file of the reference implementation, in a folder or Hub repository
    trained: Trained | None = None  # what such a file doesn't say; None: it is a known release
    stats: Path | None = None  # its statistics; None: those beside it

    def find(self, download: Download) -> Path:
        """The local file or folder, downloaded if need be: of a repository of loose files, only what is asked for."""
        path = Path(self.place).expanduser()
        if path.is_file() and self.filename is None:
            return path
        if self.filename is None:
            return locate(self.place, download)
        found = locate(self.place, download, [self.filename, f"*{STATISTICS}", f"*{lightwam.CONFIG}"]) / self.filename
        if not found.is_file():
            raise CheckpointError(f"{str(self.place)!r} has no file {self.filename!r}")
        return found


def read(
    wanted: Wanted,
    download: Download,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    text_device: torch.device | None = None,
) -> Parts:
    """Read a policy of any format.

    Raises:
        CheckpointError: it can't be found or read, or is a part of a policy only.
        ConfigError: a contract that can't be right.
    """
    path = wanted.find(download)
    if path.is_dir() and not lerobot.is_lerobot(path):
        _refuse_said(path, wanted)
        return checkpoint.read(path, download, device=device, dtype=dtype, text_device=text_device)
    found = open_foreign(path)
    if found.kind != "policy":
        raise WeightsError(
            f"{path} holds no policy but a {found.kind} ({found.layout}), which can't act: "
            f"wam convert {path} FOLDER{' and then wam train --init FOLDER' if found.kind == 'part' else ''}"
        )
    config, _ = contract_of(found, path, wanted)
    model = checkpoint.empty_model(config)
    weights.assign(model, found.tensors, str(path), dtype=dtype or getattr(torch, config.dtype), device=device)
    return checkpoint.assemble(config, model, {}, path.parent, download, text_device=text_device or device)


def open_foreign(path: Path) -> Foreign:
    """What a file or folder of another project holds, mapped, not yet read."""
    if path.is_dir() and lerobot.is_lerobot(path):
        return foreign.sort(weights.read(path), path)
    return foreign.read(path)


def contract_of(found: Foreign, path: Path, wanted: Wanted) -> tuple[PolicyConfig, Mapping[str, str]]:
    """The contract of a foreign policy, and where each part of it came from.

    Raises:
        CheckpointError: statistics are missing or don't fit, or nobody says what the policy was trained for.
        ConfigError: what was said doesn't fit the weights.
    """
    if path.is_dir():
        _refuse_said(path, wanted)
        return lerobot.contract(path, FastWAMConfig(**sizes(found.tensors, lerobot.head_dim(path))))
    if found.family == "light_wam":
        return _light_contract(found, path, wanted)
    trained = wanted.trained or RELEASES.get(path.stem)
    if trained is None or trained.variant is None or trained.action_shift is None:
        raise CheckpointError(
            f"{path.name} doesn't say what it was trained for, and is none of the releases ({', '.join(RELEASES)}); say it: "
            f"from_pretrained(…, trained=Trained(preset=…, variant=…, action_shift=…)), "
            f"or wam convert --preset {'|'.join(PRESETS)} --variant … --action-shift …"
        )
    model = FastWAMConfig(**sizes(found.tensors, trained.head_dim))
    config, stats = _contract(found, path, trained, model, wanted.stats or _statistics(path))
    said = "release of this name" if wanted.trained is None else "given by the caller"
    return config, {
        "contract": f"preset `{trained.preset}`, variant `{trained.variant}`, action shift {trained.action_shift:g} ({said})",
        "statistics": _named(stats, path),
    }


def _light_contract(found: Foreign, path: Path, wanted: Wanted) -> tuple[PolicyConfig, Mapping[str, str]]:
    run = lightwam.RunFile(lightwam.beside(path, lightwam.CONFIG))
    trained, origin = lightwam.trained(run, wanted.trained)
    model = lightwam.sizes(run, found.tensors, trained.head_dim)
    config, stats = _contract(found, path, trained, model, wanted.stats or lightwam.beside(path, STATISTICS))
    return config, {**origin, "statistics": _named(stats, path)}


def _contract(
    found: Foreign, path: Path, trained: Trained, model: FastWAMConfig | LightWAMConfig, stats: Path
) -> tuple[PolicyConfig, Path]:
    """The contract of a file of a reference implementation, whose statistics are in `stats`."""
    preset, state = preset_of(found.family, trained.preset), None
    if trained.proprio != (model.proprio_dim is not None):
        raise WeightsError(
            f"{path} holds {'no' if trained.proprio else 'a'} proprio encoder, the policy was trained "
            f"{'with' if trained.proprio else 'without'} one: it is partial or another; if that is how it was trained, say "
            f"Trained(…, proprio={not trained.proprio}), wam convert --{'no-' if trained.proprio else ''}proprio"
        )
    if model.proprio_dim is not None:
        state = statistics.read(stats, "state", preset.normalization, model.proprio_dim)
    also = () if preset.snap is None else ("min", "max")
    action = statistics.read(stats, "action", preset.normalization, model.action_dim, also)
    try:
        return contract(trained, model, state=state, action=action, dtype=_dtype(found, path)), stats
    except ConfigError as error:
        raise ConfigError(f"{path} was not trained for the preset {trained.preset!r}: {error}") from error


def tells(found: Foreign, path: Path, wanted: Wanted) -> bool:
    """Whether anybody says what a foreign policy was trained for: its folder, its run, its name, or the caller."""
    return path.is_dir() or found.family == "light_wam" or wanted.trained is not None or path.stem in RELEASES


def _refuse_said(path: Path, wanted: Wanted) -> None:
    if wanted.trained is not None or wanted.stats is not None:
        raise ConfigError(f"{path} says its own contract and statistics: leave out what was said of them")


def _named(stats: Path, path: Path) -> str:
    """Statistics for the card: by their name beside the weights, else with their folder's."""
    return f"`{stats.name}`" if stats.parent == path.parent else f"`{stats.parent.name}/{stats.name}`"


def _statistics(path: Path) -> Path:
    """The statistics published beside a file: its own, else its folder's, else those of the run whose folder is above it."""
    own, shared = path.with_name(f"{path.stem}_{STATISTICS}"), path.with_name(STATISTICS)
    runs = [place for place in lightwam.around(path, STATISTICS) if place.with_name(lightwam.CONFIG).is_file()]
    return next((place for place in (own, shared, *runs) if place.is_file()), own)


def _dtype(found: Foreign, path: Path) -> DtypeName:
    weights.check_dtype(found.tensors, str(path))
    names: dict[torch.dtype, DtypeName] = {
        torch.float32: "float32",
        torch.bfloat16: "bfloat16",
        torch.float16: "float16",
    }
    dtype = next(iter(found.tensors.values())).dtype
    if dtype not in names:
        raise WeightsError(f"{path} stores {dtype}, this package computes in {', '.join(names.values())}")
    return names[dtype]
