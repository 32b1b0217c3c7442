"""What one update does to the weights: the papers' AdamW, clipping, decay, averaging."""

import pytest
import torch
from torch import nn

from wam_policy.training.config import OptimizerConfig
from wam_policy.training.optimizer import adamw, optimizer_step, update_ema


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.modulation = nn.Linear(3, 2), nn.Parameter(torch.ones(1, 6, 2))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)


def test_the_defaults_are_the_papers():
    optimizer = adamw(Small(), OptimizerConfig())
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (
        1e-4,
        (0.9, 0.95),
        1e-8,
        0.01,
    )
    assert len(group["params"]) == 3 and group["fused"]  # nothing frozen


def test_vectors_and_modulations_decay_only_if_all_do():
    model = Small()
    decaying, still = adamw(model, OptimizerConfig(weight_decay_on="matrices")).param_groups
    assert decaying["params"] == [model.layer.weight] and decaying["weight_decay"] == 0.01
    assert {id(x) for x in still["params"]} == {
        id(model.layer.bias),
        id(model.modulation),
    } and still["weight_decay"] == 0


@pytest.mark.parametrize(("clip", "used"), [(1.0, 1.0), (float("inf"), 30.0)])
def test_gradients_longer_than_allowed_are_shortened_and_their_own_length_told(clip, used):
    model, config = (
        Small(),
        OptimizerConfig(max_grad_norm=clip, learning_rate=1.0, warmup_steps=0, weight_decay=0.0),
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    before = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = torch.full_like(p, 30.0 / sum(q.numel() for q in parameters) ** 0.5)
    norm = optimizer_step(optimizer, config, step=0, steps=10)
    moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(parameters, before, strict=True)])
    assert float(norm) == pytest.approx(30.0) and float(moved.norm()) == pytest.approx(
        used, rel=1e-4
    )
    assert all(p.grad is None for p in parameters)


def test_the_average_follows_fast_first_and_then_as_slowly_as_it_is_told():
    averaged, trained = [torch.zeros(2)], [torch.ones(2)]
    update_ema(averaged, trained, 0.9, step=0)
    assert averaged[0] == pytest.approx(1 - 2 / 11)
    averaged = [torch.zeros(2)]
    update_ema(averaged, trained, 0.9, step=10_000)
    assert averaged[0] == pytest.approx(0.1)
