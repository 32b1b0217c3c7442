"""The order of a run is a function of its seed and step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wam_policy.data.sampler import DeterministicSampler, sample_generators
from wam_policy.errors import DatasetError


@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 5), st.integers(0, 40))
def test_a_pass_shows_each_example_at_most_once_and_any_step_can_be_asked_first(
    examples, size, seed, step
):
    if examples < size:
        with pytest.raises(DatasetError, match="lower --batch-size"):
            DeterministicSampler(examples, size, seed)
        return
    order, steps = DeterministicSampler(examples, size, seed), examples // size
    seen = torch.cat([order.batch(step // steps * steps + i) for i in range(steps)])
    assert len(seen.unique()) == len(seen) == steps * size and seen.max() < examples
    assert torch.equal(DeterministicSampler(examples, size, seed).batch(step), order.batch(step))


def test_passes_and_seeds_differ():
    order, other = DeterministicSampler(50, 50, 0), DeterministicSampler(50, 50, 1)
    assert not torch.equal(order.batch(0), order.batch(1)) and not torch.equal(
        order.batch(0), other.batch(0)
    )


def test_weights_say_how_often_examples_are_drawn():
    order = DeterministicSampler(1000, 100, 0, torch.tensor([3.0] * 100 + [0.5] * 900))
    drawn = torch.cat([order.batch(step) for step in range(200)])
    assert (drawn < 100).float().mean() == pytest.approx(300 / 750, abs=0.02)


def test_what_a_sample_draws_depends_on_no_other():
    def draw(source):
        return torch.randn(3, generator=source)

    two, five = (list(map(draw, sample_generators(7, size, 0))) for size in (2, 5))
    assert torch.equal(two[1], five[1]) and not torch.equal(five[0], five[1])
    assert not torch.equal(draw(sample_generators(8, 1, 0)[0]), five[0])
