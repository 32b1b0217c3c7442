"""One control step, compiled and with its savings, against the plain forward pass that computes as the references do.

    python benchmarks/inference.py --family fast_wam --size full

Random weights, LIBERO's shape, a prompt that every side knows, the codec included, text encoder and simulator not. Each way is
a process of its own, on the same weights and observations; times are medians, the first run isn't counted. On a CPU without
bfloat16 instructions the plain way's 3-D codec runs in float32 too (in bfloat16 it needs minutes for one picture), and its
matrix products are PyTorch's. The last line: how many times faster, and the largest difference of an action.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from random_policy import TASK, Size, policy

from wam_policy import WAMPolicy, pipeline
from wam_policy.config import Family
from wam_policy.inference import compile_inference
from wam_policy.models.layers import linear
from wam_policy.profiling.benchmark import count_row, reference_step
from wam_policy.profiling.measurement import Clock, Row
from wam_policy.profiling.observations import random_observation
from wam_policy.profiling.reference import ReferenceForward, savings_of
from wam_policy.profiling.roofline import measure_machine
from wam_policy.utils.environment import peak_memory

Way = Literal["plain", "plain_wide", "caches", "eager", "compiled"]
WHAT: dict[Way, str] = {
    "plain": "as the references compute",
    "plain_wide": "the same, bfloat16 products in float32 pieces",
    "caches": "plain with every saving",
    "eager": "our forward pass, not compiled",
    "compiled": "our forward pass, compiled",
}


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """The benchmark."""

    family: Family = "fast_wam"
    size: Size = "full"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    repeats: int = 3
    """Timed runs of each way."""
    inputs: int = 2
    """Observations whose actions are compared."""
    ways: tuple[Way, ...] = ("plain", "caches", "eager", "compiled")
    batch: int = 1
    """Observations per call."""
    without: tuple[str, ...] = ()
    """Savings that "caches" leaves out, to see what each is worth."""
    way: Way | None = None
    """Used by the benchmark itself: one way, in this process."""
    out: Path | None = None
    """Likewise: where its actions go."""


def _plain(loaded: WAMPolicy, savings: Sequence[str]) -> Callable[[dict[str, Any]], np.ndarray]:
    """The plain way of a control step."""
    way, clock = ReferenceForward(loaded, savings), Clock(loaded.device)
    if linear.SLOW_BFLOAT16:
        loaded.vae.model.float()
    return lambda seen: pipeline.denormalize_actions(
        loaded.config, reference_step(loaded, way, clock, seen)
    )


def measure(config: InferenceConfig) -> dict[str, Any]:
    """One way: its times, its memory, and its actions into a file."""
    assert config.way is not None and config.out is not None
    loaded = policy(config.family, config.size, getattr(torch, config.dtype))
    began = time.perf_counter()
    step: Callable[[dict[str, Any]], np.ndarray]
    if config.way in ("eager", "compiled"):
        backend = "inductor" if config.way == "compiled" else None
        step = compile_inference(loaded, batch_sizes=(config.batch,), backend=backend).predict_chunk
    else:
        savings = set(savings_of(loaded)) - set(config.without) if config.way == "caches" else set()
        step = _plain(loaded, sorted(savings))
        linear.SLOW_BFLOAT16 = linear.SLOW_BFLOAT16 and config.way == "plain_wide"
    seen = [random_observation(loaded, config.batch, seed) for seed in range(config.inputs)]
    step(seen[0])
    ready = time.perf_counter() - began
    actions, seconds = [], []
    for run in range(max(config.repeats, config.inputs)):
        began = time.perf_counter()
        chunk = step(seen[run % config.inputs])
        seconds.append(time.perf_counter() - began)
        if run < config.inputs:
            actions.append(chunk)
    np.save(config.out, np.stack(actions))
    found = {"seconds": seconds, "ready": ready, "peak": peak_memory(torch.device("cpu"))}
    return found | ({"roof": roof(loaded, config.batch)} if config.way == "compiled" else {})


def roof(loaded: WAMPolicy, batch: int) -> str:
    """What the machine's measured rates allow: no batching makes an observation's products cheaper than this."""
    row = Row("", batch, {})
    count_row(loaded, row, random_observation(loaded, batch, 0))
    flops, machine = (
        sum(counts.flops for counts in row.counts.values()),
        measure_machine(loaded.device, loaded.dtype),
    )
    return f"{machine.describe()}; {flops / batch / 1e12:.2f} TFLOP an observation: at least {flops / batch / machine.flops:.2f} s"


def run(config: InferenceConfig, way: Way, out: Path) -> dict[str, Any]:
    """One way in a fresh process."""
    options = [
        f"--{name}={value}"
        for name, value in asdict(config).items()
        if name in ("family", "size", "dtype", "repeats")
    ]
    options += [
        f"--inputs={config.inputs}",
        f"--batch={config.batch}",
        f"--way={way}",
        f"--out={out}",
    ]
    options += ["--without", *config.without] if config.without else []
    result = subprocess.run(
        [sys.executable, __file__, *options], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(result.stdout.splitlines()[-1])


def main(config: InferenceConfig) -> None:
    """Run the benchmark, or one way of it."""
    if config.way is not None:
        print(json.dumps(measure(config)))
        return
    policy(
        config.family, config.size, getattr(torch, config.dtype)
    )  # writes the weights, if they aren't there
    median: dict[Way, float] = {}
    actions: dict[Way, np.ndarray] = {}
    print(
        f"{config.family}, {config.size}, {config.dtype}, batch {config.batch}, {os.cpu_count()} cores, prompt {TASK!r}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for way in config.ways:
            found = run(config, way, Path(folder) / f"{way}.npy")
            median[way], actions[way] = (
                statistics.median(found["seconds"]),
                np.load(Path(folder) / f"{way}.npy"),
            )
            spread = f"{min(found['seconds']):.3f} … {max(found['seconds']):.3f}"
            cost = f"ready in {found['ready']:.0f} s, peak {found['peak'] / 2**30:.2f} GiB"
            print(f"{way:10} {median[way]:8.3f} s ({spread}), {cost}: {WHAT[way]}", flush=True)
            if "roof" in found:
                print(found["roof"], flush=True)
    first = config.ways[0]
    for way in config.ways[1:]:
        each = np.abs(actions[way] - actions[first]).reshape(config.inputs, -1).max(1)
        low, middle, high = np.quantile(each, (0.1, 0.5, 0.9))
        print(
            f"{way} against {first}: {median[first] / median[way]:.2f} × faster; largest difference of an action, ",
            end="",
        )
        print(
            f"over {config.inputs} inputs: {low:.1e} {middle:.1e} {high:.1e} (10, 50, 90 %), worst {each.max():.1e}"
        )
    if {"plain", "caches", "compiled"} <= set(config.ways):
        worst = float(np.abs(actions["compiled"] - actions["plain"]).max())
        print(
            f"speedup_compiled={median['plain'] / median['compiled']:.2f} "
            f"speedup_caches={median['plain'] / median['caches']:.2f} max_abs_diff={worst:.2e}"
        )


if __name__ == "__main__":
    main(tyro.cli(InferenceConfig, description=__doc__))
