"""Rotations as robots' datasets write them."""

from __future__ import annotations

import numpy as np


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Unit quaternions (x, y, z, w) [..., 4] -> rotation vectors [..., 3] in radians; zero where nothing turns.

    As robosuite does it: angles lie in [0, 2π]. Source: spec/fastwam.md section 5.4.
    """
    w = np.clip(quaternion[..., 3:], -1.0, 1.0)
    sine = np.sqrt(1.0 - w * w)
    still = np.isclose(sine, 0.0)
    return np.where(still, 0.0, quaternion[..., :3] * 2.0 * np.arccos(w) / np.where(still, 1.0, sine))
