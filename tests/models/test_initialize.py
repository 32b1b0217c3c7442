import pytest
import torch
from tiny import make_config

from wam_policy.models.fast_wam.initialize import action_from_video
from wam_policy.models.fast_wam.model import FastWAM


@pytest.fixture
def model():
    torch.manual_seed(0)
    return FastWAM(make_config().model)


def made(model):
    return action_from_video(model.video.state_dict(), model.action.state_dict())


def test_it_makes_all_of_the_action_expert_but_its_input_and_output(model):
    weights, wanted = made(model), model.action.state_dict()
    fresh = {"action_encoder.weight", "action_encoder.bias", "head.weight", "head.bias"}
    assert weights.keys() == wanted.keys() - fresh
    assert all(weights[name].shape == wanted[name].shape for name in weights)


def test_what_has_the_video_expert_s_shape_is_copied(model):
    name = "blocks.1.self_attn.q.bias"
    assert torch.equal(made(model)[name], model.video.state_dict()[name])


def test_a_narrower_input_is_scaled_to_keep_the_output_s_variance(model):
    model.video.blocks[0].self_attn.q.weight.data.fill_(1.0)
    assert torch.allclose(
        made(model)["blocks.0.self_attn.q.weight"], torch.tensor((16 / 12) ** 0.5)
    )


def test_a_narrower_output_alone_is_not_scaled(model):
    model.video.blocks[0].self_attn.o.weight.data.fill_(1.0)
    assert (made(model)["blocks.0.self_attn.o.weight"] == 1).all()


def test_the_ends_of_an_axis_stay_its_ends(model):
    bias = model.video.blocks[0].ffn[2].bias.data
    shrunk = made(model)["blocks.0.ffn.2.bias"]
    assert shrunk[0] == bias[0] and torch.isclose(shrunk[-1], bias[-1])
