"""Pictures of a dataset as the model sees them: whole canvases, and clips of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from wam_policy import images
from wam_policy.errors import DatasetError
from wam_policy.training.lerobot_reader import LeRobotDataset


def canvases(dataset: LeRobotDataset, cameras: tuple[str, ...]) -> np.ndarray:
    """Every frame's canvas, uint8 [frames, H, ΣW, 3], in memory."""
    missing = [name for name in cameras if f"observation.images.{name}" not in dataset.cameras]
    if missing:
        raise DatasetError(f"{dataset.folder} has no cameras {missing}; it has {dataset.cameras}")
    return images.compose([dataset.frames(f"observation.images.{name}") for name in cameras], "row")


def clips(canvas: np.ndarray, rows: np.ndarray) -> Tensor:
    """Frames of windows, float [B, 3, F, H, W] in [-1, 1], from canvases and row numbers [B, F]."""
    return torch.from_numpy(images.to_model(canvas[rows])).movedim(1, 2).contiguous()
