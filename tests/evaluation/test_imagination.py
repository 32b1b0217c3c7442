"""Tests of the comparison of imagined with real futures."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wam_policy.evaluation.imagination import Future, psnr_by_frame, side_by_side
from wam_policy.evaluation.metrics import psnr

BLACK = np.zeros((2, 4, 4, 3), np.uint8)
GREY = np.full((2, 4, 4, 3), 51, np.uint8)


@given(st.integers(1, 255))
def test_psnr_is_that_of_the_mean_squared_error(difference):
    other = np.full_like(BLACK, difference)
    assert psnr(BLACK, other) == pytest.approx(20 * np.log10(255 / difference))


def test_equal_pictures_have_no_error():
    assert psnr(GREY, GREY) == float("inf")


def test_futures_are_scored_frame_by_frame_as_far_as_the_episode_went():
    whole = Future(np.stack([GREY[0]] * 3), np.stack([GREY[0], GREY[0], BLACK[0]]))
    cut_short = Future(np.stack([GREY[0]] * 2), np.stack([GREY[0], BLACK[0]]))
    scores = psnr_by_frame([whole, cut_short])
    half_wrong = 10 * np.log10(255**2 / (51**2 / 2))
    wrong = 20 * np.log10(5)
    assert scores["psnr_db"] == pytest.approx([half_wrong, wrong])
    assert scores["still_psnr_db"] == pytest.approx([half_wrong, wrong])


def test_a_perfect_score_is_a_number_that_json_holds():
    assert psnr_by_frame([Future(GREY, GREY)])["psnr_db"] == [100.0]


def test_a_film_shows_what_happened_above_what_was_imagined():
    (first, second) = side_by_side([Future(imagined=BLACK, real=GREY)])
    assert first.shape == (8, 4, 3) and (first[:4] == 51).all() and (second[4:] == 0).all()
