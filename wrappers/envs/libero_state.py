"""Poses as robots' datasets write them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def libero_state(observation: Mapping[str, np.ndarray]) -> np.ndarray:
    """LIBERO's state as its datasets hold it: position, rotation vector and fingers of the hand, [..., 8].

    Source: spec/fastwam.md section 5.4.
    """
    rotation = axis_angle(observation["robot0_eef_quat"])
    return np.concatenate(
        (observation["robot0_eef_pos"], rotation, observation["robot0_gripper_qpos"]), axis=-1
    )


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Unit quaternions (x, y, z, w) [..., 4] -> rotation vectors [..., 3] in radians; zero where nothing turns.

    As robosuite does it: angles lie in [0, 2π]. Source: spec/fastwam.md section 5.4.
    """
    w = np.clip(quaternion[..., 3:], -1.0, 1.0)
    sine = np.sqrt(1.0 - w * w)
    still = np.isclose(sine, 0.0)
    return np.where(
        still, 0.0, quaternion[..., :3] * 2.0 * np.arccos(w) / np.where(still, 1.0, sine)
    )
