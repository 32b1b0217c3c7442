import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from wam_policy.errors import ConfigError
from wam_policy.normalize import Normalization, compute_statistics

rows = arrays(
    np.float32, st.tuples(st.integers(2, 20), st.just(3)), elements=st.floats(-100, 100, width=32)
)


@pytest.mark.parametrize("mode", ["min_max", "quantile", "z_score", "identity"])
@given(rows)
def test_the_inverse_gives_back_what_was_not_clamped(mode, x):
    normalization = Normalization(mode=mode, statistics=compute_statistics(x))
    normalized = normalization.normalize(x)
    assert (np.abs(normalized) <= 5).all() and normalized.dtype == np.float32
    inside = np.abs(normalized) < 5
    assert np.allclose(normalization.denormalize(normalized)[inside], x[inside], atol=1e-2)


@given(rows)
def test_min_max_spans_minus_one_to_one_where_there_is_a_range(x):
    normalized = Normalization(mode="min_max", statistics=compute_statistics(x)).normalize(x)
    wide = np.ptp(x, axis=0) > 0.1
    assert np.allclose(normalized[:, wide].min(0), -1, atol=1e-3) and np.allclose(
        normalized[:, wide].max(0), 1, atol=1e-3
    )


def test_constant_numbers_are_shifted_to_zero_and_not_scaled():
    normalization = Normalization(mode="min_max", statistics={"min": (2.0,), "max": (2.00001,)})
    assert normalization.normalize(np.array([2.0, 2.5])).tolist() == [0, 0.5]


def test_only_the_forward_direction_clamps():
    normalization = Normalization(mode="min_max", statistics={"min": (-1.0,), "max": (1.0,)})
    assert (
        normalization.normalize(np.array([9.0])) == 5
        and normalization.denormalize(np.array([9.0])) == 9
    )


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"mode": "best", "statistics": {}}, "unknown normalisation"),
        ({"mode": "z_score", "statistics": {"mean": (0.0,)}}, r"needs the statistics \['std'\]"),
        ({"mode": "min_max", "statistics": {"min": (0.0,), "max": (1.0, 2.0)}}, "have its length"),
        ({"mode": "min_max", "statistics": {"min": (0.0,), "max": (np.nan,)}}, "is not finite"),
    ],
)
def test_statistics_that_can_t_be_are_refused(arguments, match):
    with pytest.raises(ConfigError, match=match):
        Normalization(**arguments)


def test_lerobot_s_rule_does_not_clamp_and_takes_only_what_never_varied_as_constant():
    statistics = {"min": (0.0, 1.0, 3.0), "max": (2.0, 1.00001, 3.0)}
    theirs = Normalization(mode="min_max", statistics=statistics, rule="lerobot")
    assert np.allclose(
        theirs.normalize(np.array([20.0, 1.00001, 3.0])), [19.0, 1.0, -1.0], atol=1e-2
    )
    assert np.allclose(theirs.denormalize(np.array([19.0, 1.0, -1.0])), [20.0, 1.00001, 3.0])
    reference = Normalization(mode="min_max", statistics=statistics)
    assert np.allclose(
        reference.normalize(np.array([20.0, 1.00001, 3.0])), [5.0, 0.0, 0.0], atol=1e-4
    )


def test_an_unknown_rule_is_refused():
    with pytest.raises(ConfigError, match="unknown normalisation rule 'mine'"):
        Normalization(mode="identity", statistics={}, rule="mine")
