"""The optimizer of a run, its learning rate, and the averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from wam_policy.training.config import OptimizerConfig
from wam_policy.training.distributed import full_tensor


def adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW over what is trained; with `decay` "matrices" vectors, and a block's modulation, don't decay."""
    trained = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    groups: list[dict[str, Any]] = [{"params": list(trained.values())}]
    if config.weight_decay_on == "matrices":
        vectors = {name for name, x in trained.items() if x.ndim < 2 or name.endswith("modulation")}
        groups = [
            {"params": [x for name, x in trained.items() if name not in vectors]},
            {"params": [x for name, x in trained.items() if name in vectors], "weight_decay": 0.0},
        ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine down to a hundredth (spec/fastwam.md section 6)."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def optimizer_step(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, step: int, steps: int
) -> Tensor:
    """Clip the gradients, make one step, forget them; returns the norm they had.

    Args:
        optimizer: from `adamw`.
        config: its options.
        step: of the run, from 0.
        steps: of the whole run.
    """
    warmup = steps // 20 if config.warmup_steps is None else config.warmup_steps
    parameters: list[Tensor] = []
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * warmup_cosine(step, steps, warmup)
        parameters.extend(group["params"])
    norm = full_tensor(nn.utils.clip_grad_norm_(parameters, config.max_grad_norm))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


@torch.no_grad()
def update_ema(
    averaged: Iterable[Tensor], trained: Iterable[Tensor], decay: float, step: int
) -> None:
    """Move averaged weights a step towards the trained ones, faster in the first steps."""
    torch._foreach_lerp_(list(averaged), list(trained), 1 - min(decay, (2 + step) / (11 + step)))
