"""Reads a policy of any format: our own, a file of the reference implementation, a folder of LeRobot's."""

from __future__ import annotations

from pathlib import Path

import torch

from wam_policy.errors import WeightsError
from wam_policy.hub import checkpoint, weights
from wam_policy.hub.checkpoint import PolicyParts
from wam_policy.hub.download import DownloadOptions
from wam_policy.hub.foreign import identify, lerobot
from wam_policy.hub.foreign.contracts import foreign_config
from wam_policy.hub.foreign.identify import ForeignCheckpoint
from wam_policy.hub.request import CheckpointRequest, refuse_release_info


def load_policy(
    wanted: CheckpointRequest,
    download: DownloadOptions,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    text_device: torch.device | None = None,
) -> PolicyParts:
    """Read a policy of any format.

    Raises:
        CheckpointError: it can't be found or read, or is a part of a policy only.
        ConfigError: a contract that can't be right.
    """
    path = wanted.locate(download)
    if path.is_dir() and not lerobot.is_lerobot(path):
        refuse_release_info(path, wanted)
        return checkpoint.read_checkpoint(
            path, download, device=device, dtype=dtype, text_device=text_device
        )
    found = read_foreign(path)
    if found.kind != "policy":
        raise WeightsError(
            f"{path} holds no policy but a {found.kind} ({found.layout}), which can't act: "
            f"wam convert {path} FOLDER{' and then wam train --pretrained-path FOLDER' if found.kind == 'part' else ''}"
        )
    config, _ = foreign_config(found, path, wanted)
    model = checkpoint.empty_model(config)
    weights.assign_weights(
        model, found.tensors, str(path), dtype=dtype or getattr(torch, config.dtype), device=device
    )
    return checkpoint.assemble(
        config, model, {}, path.parent, download, text_device=text_device or device
    )


def read_foreign(path: Path) -> ForeignCheckpoint:
    """What a file or folder of another project holds, mapped, not yet read."""
    if path.is_dir() and lerobot.is_lerobot(path):
        return identify.identify(weights.read_weights(path), path)
    return identify.read_foreign_file(path)
