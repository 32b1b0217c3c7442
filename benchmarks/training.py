"""One training step, compiled, against the plain one that computes as the references do.

    python benchmarks/training.py --family fast_wam

Random weights of a middling size (width 768, twelve layers), LIBERO's pictures and chunks, float32; forward, backward, clipping
and AdamW. "plain" begins at the pictures, as the references' training does unless it is told otherwise: each sample is encoded
in the step. "latents" is the same from cached latents, where all our ways begin. Each way is a process of its own, on the same
weights and batches; times are medians, the first steps aren't counted, memory is the largest of a step. The last line: how many
times faster than "plain", and what part of its memory.
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
import torch.nn.functional as F  # noqa: N812  # PyTorch's own name for it
import tyro
from plain_training import plain_fast, plain_light
from random_policy import TOKENS, Size, random_parts, smaller
from torch import Tensor

from wam_policy.config import Family
from wam_policy.models.encoders.vae import VAE
from wam_policy.models.fast_wam.loss import Batch, LossConfig
from wam_policy.models.fast_wam.model import FastWAM
from wam_policy.models.layers.text_padding import condense_padding
from wam_policy.models.light_wam.loss import LightLossConfig
from wam_policy.models.light_wam.model import is_trainable
from wam_policy.models.registry import compute_losses, sample_noise
from wam_policy.training.compile import compile_training
from wam_policy.training.config import OptimizerConfig
from wam_policy.training.optimizer import adamw, optimizer_step
from wam_policy.utils.environment import forget_peak_memory, peak_memory

Way = Literal["plain", "latents", "eager", "compiled", "checkpointing"]
WAYS: tuple[Way, ...] = ("plain", "latents", "eager", "compiled", "checkpointing")
REFERENCE = ("plain", "latents")  # computed as the references do
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


def random_pictures(size: int, seed: int) -> Tensor:
    """Clips of nine frames of 224×448 pixels."""
    return torch.rand(size, 3, 9, 224, 448, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@torch.no_grad()
def encoded(vae: VAE, pictures: Tensor) -> Tensor:
    """Clips as latents, one sample after the other, as the references encode them."""
    return torch.cat([vae.encode(sample) for sample in pictures.split(1)])


def random_batch(model: Any, latents: Tensor, seed: int) -> Batch:
    """LIBERO's shapes beside latents: 32 actions, a prompt padded to 128 tokens."""
    generator, config, size = torch.Generator().manual_seed(seed), model.config, len(latents)

    def normal(*shape: int) -> Tensor:
        return torch.randn(size, *shape, generator=generator)

    return Batch(
        latents,
        F.pad(normal(TOKENS, config.text_dim), (0, 0, 0, 128 - TOKENS)),
        normal(32, config.action_dim),
        normal(config.proprio_dim),
        torch.zeros(size, 32, dtype=torch.bool),
        torch.zeros(size, 2, dtype=torch.bool),
    )


def loss_of(model: Any, way: Way) -> Callable[[Batch, torch.Generator], Tensor]:
    """A batch and a source of random numbers -> the loss, one way of computing it."""
    config: Any = LossConfig(action_shift=5.0) if isinstance(model, FastWAM) else LightLossConfig()
    if way in REFERENCE:
        plain: Any = plain_fast if isinstance(model, FastWAM) else plain_light
        return lambda batch, generator: plain(
            model, batch, sample_noise(model, batch, generator, None), config
        )
    return lambda batch, generator: (
        compute_losses(
            model, batch, sample_noise(model, batch, generator, None), config, None
        ).total
    )


def measure(config: TrainingConfig) -> dict[str, Any]:
    """One way: its times, its memory and the norms of its gradients."""
    assert config.way is not None
    parts = random_parts(smaller(config.family, config.size), config.size, torch.float32)
    model, vae = parts.model, parts.vae()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(isinstance(model, FastWAM) or is_trainable(name))
    generator = torch.Generator().manual_seed(0)
    for (
        name,
        parameter,
    ) in (
        model.named_parameters()
    ):  # gates as open as trained ones: else the loss hardly knows of the blocks
        if name.endswith(".modulation"):
            parameter.data.normal_(generator=generator)
    if config.way in ("compiled", "checkpointing"):
        compile_training(model, checkpointing=config.way == "checkpointing")
    options, loss = OptimizerConfig(), loss_of(model, config.way)
    optimizer, seconds, norms = adamw(model, options), [], list[Tensor]()
    pictures = [random_pictures(config.batch, step) for step in range(WARMUPS + config.repeats)]
    cached = None if config.way == "plain" else [encoded(vae, clips) for clips in pictures]
    for step, clips in enumerate(pictures):
        if step == WARMUPS:
            forget_peak_memory(torch.device("cpu"))
        began = time.perf_counter()
        latents = encoded(vae, clips) if cached is None else cached[step]
        batch, generator = random_batch(model, latents, step), torch.Generator().manual_seed(step)
        if config.way not in REFERENCE:
            context, bias = condense_padding(batch.context, proprio=True, dtype=torch.float32)
            batch = batch._replace(context=context, text_bias=bias)
        loss(batch, generator).backward()
        norms.append(optimizer_step(optimizer, options, step, 1000))
        seconds.append(time.perf_counter() - began)
    peak = peak_memory(torch.device("cpu"))
    return {
        "seconds": seconds[WARMUPS:],
        "first": seconds[0],
        "norms": [float(norm) for norm in norms],
        "peak": peak,
    }


def main(config: TrainingConfig) -> None:
    """Run the benchmark, or one way of it."""
    if config.way is not None:
        print(json.dumps(measure(config)))
        return
    print(f"{config.family}, {config.size}, float32, batch {config.batch}, {os.cpu_count()} cores")
    found: dict[Way, dict[str, Any]] = {}
    for way in config.ways:
        options = [
            f"--{name}={getattr(config, name)}" for name in ("family", "size", "batch", "repeats")
        ]
        command = [sys.executable, __file__, *options, f"--way={way}"]
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[way] = one = json.loads(result.stdout.splitlines()[-1])
        median = statistics.median(one["seconds"])
        spread = f"{min(one['seconds']):.2f} … {max(one['seconds']):.2f}"
        rate, peak = config.batch / median, one["peak"] / 2**30
        first = f"first step {one['first']:.0f} s"
        print(
            f"{way:14} {median:6.2f} s ({spread}), {rate:.2f} samples/s, peak {peak:.2f} GiB, {first}",
            flush=True,
        )
    if "compiled" not in found:
        return
    compiled = found["compiled"]
    for way in ("latents", "plain"):
        if way in found:
            plain = found[way]
            worst = max(
                abs(a / b - 1) for a, b in zip(compiled["norms"], plain["norms"], strict=True)
            )
            speedup = statistics.median(plain["seconds"]) / statistics.median(compiled["seconds"])
            print(
                f"compiled against {way}, over {len(plain['norms'])} steps the norm of all gradients differs by {worst:.0e}"
            )
            print(f"speedup={speedup:.2f} memory_ratio={compiled['peak'] / plain['peak']:.2f}")


if __name__ == "__main__":
    main(tyro.cli(TrainingConfig, description=__doc__))
