"""Proprioceptive state of LIBERO in the format of its datasets."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def libero_state(observation: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the state vector of LIBERO's datasets.

    The format is that of `experiments/libero/eval_libero_single.py` in
    https://github.com/yuantianyuan01/FastWAM.

    Args:
        observation: Observation of robosuite with the entries of the robot "robot0".

    Returns:
        State [..., 8]: position (3, metres) and rotation vector (3, radians) of the hand, and the
        positions of the two fingers (2, metres).
    """
    position = observation["robot0_eef_pos"]
    rotation = axis_angle(observation["robot0_eef_quat"])
    fingers = observation["robot0_gripper_qpos"]
    return np.concatenate((position, rotation, fingers), axis=-1)


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Convert unit quaternions to rotation vectors, with robosuite's convention.

    Args:
        quaternion: Unit quaternions (x, y, z, w) [..., 4].

    Returns:
        Rotation vectors [..., 3]: axis times angle, the angle in [0, 2π] radians; zero for the
        identity.
    """
    vector = quaternion[..., :3]
    # Rounding may leave `w` slightly outside the domain of `arccos`.
    w = np.clip(quaternion[..., 3:], -1.0, 1.0)
    sine = np.sqrt(1.0 - w * w)

    # Without rotation the axis is undefined: divide by 1 instead of 0, then return zero.
    is_identity = np.isclose(sine, 0.0)
    divisor = np.where(is_identity, 1.0, sine)
    angle = np.arccos(w)
    rotation = vector * 2.0 * angle / divisor
    return np.where(is_identity, 0.0, rotation)
