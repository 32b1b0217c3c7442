"""How alike pictures are."""

from __future__ import annotations

import numpy as np


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of pictures, uint8 of one shape, in dB; infinite for equal ones."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def psnr_over(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """PSNR of many pictures as of one large one, at most 100 dB."""
    return min(100.0, psnr(*(np.stack(side) for side in zip(*pairs, strict=True))))
