import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from wam_policy.wrappers.envs.libero_state import axis_angle


@given(st.floats(0.1, 6.2), st.integers(0, 2**32 - 1))
def test_the_axis_and_the_angle_come_back(angle, seed):
    axis = np.random.default_rng(seed).standard_normal(3)
    axis /= np.linalg.norm(axis)
    quaternion = np.concatenate((axis * np.sin(angle / 2), [np.cos(angle / 2)]))
    assert np.allclose(axis_angle(quaternion), axis * angle, atol=1e-6)


def test_what_is_not_turned_is_zero_also_beyond_rounding():
    quaternions = np.array([[0, 0, 0, 1.0], [0, 0, 0, -1.0], [0, 0, 0, 1.0000001]])
    assert (axis_angle(quaternions) == 0).all()
