"""Reads a policy of any format: our own, a file of the reference implementation, a folder of LeRobot's."""

from __future__ import annotations

from pathlib import Path

import torch

from wam_policy.errors import WeightsError
from wam_policy.hub import checkpoint, weights
from wam_policy.hub.checkpoint import Parts
from wam_policy.hub.download import Download
from wam_policy.hub.foreign import identify, lerobot
from wam_policy.hub.foreign.contracts import contract_of
from wam_policy.hub.foreign.identify import Foreign
from wam_policy.hub.request import Wanted, _refuse_said


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
        return identify.sort(weights.read(path), path)
    return identify.read(path)
