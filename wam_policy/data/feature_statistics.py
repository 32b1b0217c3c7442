"""Statistics of the features of a LeRobot dataset, as its `meta/stats.json` holds them."""

# T frames, H W pixels

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class PixelStatistics:
    """Running minimum, maximum, mean and standard deviation per colour channel.

    Values lie in [0, 1], as LeRobot stores them.
    """

    def __init__(self) -> None:
        self.low = np.full(3, np.inf)
        self.high = np.full(3, -np.inf)
        self.total = np.zeros(3)
        self.total_squares = np.zeros(3)
        self.pixels = 0
        self.frames = 0

    def add(self, images: np.ndarray) -> None:
        """Add frames, uint8 [T, H, W, 3]."""
        x = images.reshape(-1, 3) / 255.0
        self.low = np.minimum(self.low, x.min(0))
        self.high = np.maximum(self.high, x.max(0))
        self.total = self.total + x.sum(0)
        self.total_squares = self.total_squares + (x**2).sum(0)
        self.pixels += len(x)
        self.frames += len(images)

    def result(self) -> dict[str, Any]:
        """Return the statistics by name, each of shape [3, 1, 1], and the number of frames."""
        mean = self.total / self.pixels
        mean_square = self.total_squares / self.pixels
        # Rounding may leave a small negative variance.
        variance = np.maximum(mean_square - mean**2, 0)
        values = {
            "min": self.low,
            "max": self.high,
            "mean": mean,
            "std": np.sqrt(variance),
        }
        result: dict[str, Any] = {}
        for name, value in values.items():
            result[name] = value.reshape(3, 1, 1).tolist()
        result["count"] = [self.frames]
        return result


def vector_statistics(rows: Sequence[Any]) -> dict[str, Any]:
    """Return the statistics of vectors or of single numbers, as LeRobot stores them."""
    x = np.asarray(rows, np.float64)
    x = x.reshape(len(rows), -1)  # [rows, numbers]
    values = {
        "min": x.min(0),
        "max": x.max(0),
        "mean": x.mean(0),
        "std": x.std(0),
    }
    for percent in (1, 10, 50, 90, 99):
        name = f"q{percent:02d}"
        values[name] = np.quantile(x, percent / 100, axis=0)

    result: dict[str, Any] = {}
    for name, value in values.items():
        result[name] = value.tolist()
    result["count"] = [len(x)]
    return result
