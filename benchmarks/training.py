"""One training step, compiled, against the plain one that computes as the references do.

    python benchmarks/training.py --family fast_wam

Random weights of a middling size (width 768, twelve layers), LIBERO's latents and chunks, float32; forward, backward, clipping
and AdamW. Each way is a process of its own, on the same weights and batches; times are medians, the first steps aren't counted,
memory is the largest of a step. The last line: how many times faster, and what part of the memory.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro
from plain_training import plain_fast, plain_light
from random_policy import Size, random_parts, smaller
from torch import Tensor

from wam_policy.config import Family
from wam_policy.models.fast_wam import FastWAM
from wam_policy.models.light_objective import LightLossConfig, light_draw, light_losses
from wam_policy.models.light_wam import trained
from wam_policy.models.objective import Batch, LossConfig, draw, training_losses
from wam_policy.results import forget_peak_memory, peak_memory
from wam_policy.training.compiled import compile_training
from wam_policy.training.config import OptimizerConfig
from wam_policy.training.optimize import adamw, update

Way = Literal["plain", "eager", "compiled", "checkpointing"]
WAYS: tuple[Way, ...] = ("plain", "eager", "compiled", "checkpointing")
WARMUPS = 2


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The benchmark."""

    family: Family = "fast_wam"
    size: Size = "mid"
    batch: int = 2
    repeats: int = 5
    """Timed steps of each way."""
    ways: tuple[Way, ...] = WAYS
    way: Way | None = None
    """Used by the benchmark itself: one way, in this process."""


def random_batch(model: Any, size: int, seed: int) -> Batch:
    """LIBERO's shapes: nine frames of 224×448 pixels as the family's codec encodes them, 32 actions, 128 tokens of text."""
    generator, config = torch.Generator().manual_seed(seed), model.config
    side = 14 if isinstance(model, FastWAM) else 28

    def normal(*shape: int) -> Tensor:
        return torch.randn(size, *shape, generator=generator)

    return Batch(
        normal(config.latent_channels, 3, side, 2 * side),
        normal(128, config.text_dim),
        normal(32, config.action_dim),
        normal(config.proprio_dim),
        torch.zeros(size, 32, dtype=torch.bool),
        torch.zeros(size, 2, dtype=torch.bool),
    )


def loss_of(model: Any, way: Way) -> Callable[[Batch, torch.Generator], Tensor]:
    """A batch and a source of random numbers -> the loss, one way of computing it."""
    if isinstance(model, FastWAM):
        fast = LossConfig(action_shift=5.0)
        if way == "plain":
            return lambda batch, generator: plain_fast(model, batch, draw(batch, generator), fast)
        return lambda batch, generator: training_losses(model, batch, draw(batch, generator), fast).total
    light, factor = LightLossConfig(), model.config.video_pool
    if way == "plain":
        return lambda batch, generator: plain_light(model, batch, light_draw(batch, factor, generator), light)
    return lambda batch, generator: light_losses(model, batch, light_draw(batch, factor, generator), light).total


def measure(config: TrainingConfig) -> dict[str, Any]:
    """One way: its times, its memory and its losses."""
    assert config.way is not None
    model = random_parts(smaller(config.family, config.size), config.size, torch.float32).model
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(isinstance(model, FastWAM) or trained(name))
    if config.way in ("compiled", "checkpointing"):
        compile_training(model, checkpointing=config.way == "checkpointing")
    options, loss = OptimizerConfig(), loss_of(model, config.way)
    optimizer, seconds, losses = adamw(model, options), [], []
    for step in range(WARMUPS + config.repeats):
        if step == WARMUPS:
            forget_peak_memory(torch.device("cpu"))
        batch, generator = random_batch(model, config.batch, step), torch.Generator().manual_seed(step)
        began = time.perf_counter()
        found = loss(batch, generator)
        found.backward()
        update(optimizer, options, step, 1000)
        seconds.append(time.perf_counter() - began)
        losses.append(float(found.detach()))
    return {"seconds": seconds[WARMUPS:], "first": seconds[0], "losses": losses, "peak": peak_memory(torch.device("cpu"))}


def main(config: TrainingConfig) -> None:
    """Run the benchmark, or one way of it."""
    if config.way is not None:
        print(json.dumps(measure(config)))
        return
    print(f"{config.family}, {config.size}, float32, batch {config.batch}, {os.cpu_count()} cores")
    found: dict[Way, dict[str, Any]] = {}
    for way in config.ways:
        options = [f"--{name}={getattr(config, name)}" for name in ("family", "size", "batch", "repeats")]
        command = [sys.executable, __file__, *options, f"--way={way}"]
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[way] = one = json.loads(result.stdout.splitlines()[-1])
        median = statistics.median(one["seconds"])
        spread = f"{min(one['seconds']):.2f} … {max(one['seconds']):.2f}"
        rate, peak = config.batch / median, one["peak"] / 2**30
        first = f"first step {one['first']:.0f} s"
        print(f"{way:14} {median:6.2f} s ({spread}), {rate:.2f} samples/s, peak {peak:.2f} GiB, {first}", flush=True)
    if {"plain", "compiled"} <= set(found):
        plain, compiled = found["plain"], found["compiled"]
        worst = max(abs(a - b) for a, b in zip(plain["losses"], compiled["losses"], strict=True))
        print(f"largest difference of the loss over {len(plain['losses'])} steps: {worst:.1e}")
        speedup = statistics.median(plain["seconds"]) / statistics.median(compiled["seconds"])
        print(f"speedup={speedup:.2f} memory_ratio={compiled['peak'] / plain['peak']:.2f}")


if __name__ == "__main__":
    main(tyro.cli(TrainingConfig, description=__doc__))
