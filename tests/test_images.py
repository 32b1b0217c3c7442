import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wam_policy import images
from wam_policy.errors import ObservationError


def test_every_grey_level_is_mapped_evenly_to_the_model_s_range():
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    there = images.to_model(every)
    assert there.shape == (1, 3, 16, 16) and there.dtype == np.float32
    assert np.allclose(there[0, 0].ravel(), np.linspace(-1, 1, 256), atol=1e-6)


@given(st.integers(5, 40), st.integers(5, 40), st.integers(4, 20), st.integers(4, 20))
def test_cover_always_gives_the_wanted_size(height, width, wanted_height, wanted_width):
    picture = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)
    assert images.fit(picture, wanted_height, wanted_width, "cover").shape == (2, wanted_height, wanted_width, 3)


def test_cover_keeps_the_centre_and_does_not_stretch():
    picture = np.zeros((1, 10, 30, 3), np.uint8)
    picture[:, :, 10:20] = 200
    assert (images.fit(picture, 10, 10, "cover") == 200).all()


def test_exact_refuses_another_size_by_the_camera_s_name():
    with pytest.raises(ObservationError, match=r"'top': expected \(4, 4\).*got \(4, 5\)"):
        images.fit(np.zeros((1, 4, 5, 3), np.uint8), 4, 4, "exact", "top")


def test_cameras_stand_side_by_side_in_order():
    canvas = images.side_by_side([np.full((1, 2, 2, 3), i, np.uint8) for i in range(3)])
    assert canvas[0, 0, :, 0].tolist() == [0, 0, 1, 1, 2, 2]
