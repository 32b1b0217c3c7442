"""Similarity of pictures."""

from __future__ import annotations

import numpy as np

MAX_PSNR_DB = 100.0


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two arrays of pictures in dB.

    Args:
        a: Pictures, uint8 of any shape.
        b: Pictures of the same shape and dtype.

    Returns:
        The ratio; infinite for equal pictures.
    """
    # In float64: differences of uint8 would wrap around.
    difference = a.astype(np.float64) - b.astype(np.float64)
    error = np.mean(difference**2)
    if error == 0:
        return float("inf")
    return float(10 * np.log10(255**2 / error))


def psnr_over(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Return the PSNR in dB over all pixels of many pairs of pictures, at most 100 dB."""
    # One large picture: the mean is over the error, not over the decibels.
    first = np.stack([pair[0] for pair in pairs])
    second = np.stack([pair[1] for pair in pairs])
    return min(MAX_PSNR_DB, psnr(first, second))
