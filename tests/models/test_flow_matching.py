import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wam_policy.models import flow_matching

shifts = st.floats(0.5, 10)


def test_bf16_schedule_is_the_references_to_the_bit():
    timesteps, deltas = flow_matching.make_schedule(10, 5.0, dtype=torch.bfloat16)
    assert timesteps.tolist() == [1000, 980, 952, 920, 884, 832, 768, 680, 556, 358]
    assert deltas.sum(dtype=torch.float64).item() == -0.999755859375


@given(st.integers(1, 50), shifts)
def test_a_schedule_runs_from_noise_to_data(steps, shift):
    timesteps, deltas = flow_matching.make_schedule(steps, shift)
    assert timesteps[0].item() == pytest.approx(1000) and (timesteps.diff() < 0).all()
    assert (deltas < 0).all() and deltas.sum().item() == pytest.approx(-1, abs=1e-5)


def test_zero_steps_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        flow_matching.make_schedule(0, 5.0)


@given(shifts)
def test_loss_weight_averages_to_one_over_the_training_distribution(shift):
    u = torch.arange(1, 1001, dtype=torch.float64) / 1000
    weight = flow_matching.loss_weight(1000 * flow_matching.shift_time(u, shift), shift)
    assert weight.mean().item() == pytest.approx(1, abs=1e-3)
    assert (weight >= -1e-6).all()


def test_loss_weight_has_the_published_values_at_shift_5():
    weight = flow_matching.loss_weight(torch.tensor([500.0, 1000.0, 0.0]), 5.0)
    assert weight.tolist() == pytest.approx([2.0764, 0, 0], abs=1e-4)


@given(st.floats(0, 1))
def test_noising_and_the_velocity_lead_back_to_the_data(u):
    clean, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    t = flow_matching.timesteps(torch.full((2,), u), 5.0)
    noisy = flow_matching.add_noise(clean, noise, t)
    delta = -(t[0] / 1000)
    assert torch.allclose(
        flow_matching.euler_step(noisy, flow_matching.velocity(clean, noise), delta),
        clean,
        atol=1e-5,
    )


def test_time_is_half_way_where_the_shift_puts_it():
    assert flow_matching.timesteps(torch.tensor([0.5]), 5.0).item() == pytest.approx(1000 * 2.5 / 3)
    assert not math.isnan(flow_matching.timesteps(torch.tensor([0.0]), 5.0).item())
