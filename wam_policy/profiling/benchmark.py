"""`wam bench`: what a control step costs, stage by stage, compiled and not, with each saving left out, against the machine."""

# B batch, T actions in a chunk, A numbers per action

from __future__ import annotations

import functools
import gc
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from wam_policy import pipeline, sampling
from wam_policy.checkpoints import resolve_checkpoint
from wam_policy.errors import ConfigError
from wam_policy.inference.compile import compile_inference
from wam_policy.inference.weight_transforms import Quantization
from wam_policy.models.light_wam.model import LightWAM
from wam_policy.policy import WAMPolicy
from wam_policy.profiling.measurement import Clock, Row
from wam_policy.profiling.observations import (
    ObservationSource,
    random_observations,
    rollout_observations,
)
from wam_policy.profiling.op_counter import count_operations
from wam_policy.profiling.reference import ReferenceForward, savings_of
from wam_policy.profiling.report import benchmark_table, card_section, write_chart
from wam_policy.profiling.roofline import measure_machine
from wam_policy.utils import environment
from wam_policy.utils.io import write_text

WARMUPS = 2


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Measurement of a checkpoint's control step."""

    checkpoint: str = "embedded:metaworld-fast-wam"
    """Folder, file of a known release, Hub id, or "embedded:<name>"."""
    batch_sizes: tuple[int, ...] = (1, 4)
    """Observations per call."""
    repeats: int = 20
    """Timed runs of each way."""
    savings: bool = True
    """Measure the uncompiled step without each exact saving too, one observation at a time."""
    steps: tuple[int, ...] = ()
    """Also with so many denoising steps, and the error that makes: not exact."""
    quantize: tuple[Quantization, ...] = ()
    """Also quantized by torchao, and the error that makes: not exact."""
    encode_every: tuple[int, ...] = ()
    """Also with observations encoded only every so many calls, and the error that makes: not exact."""
    env: str | None = None
    """Measure on what the policy meets in this env (a Gymnasium id), not on random pictures, each unlike the one before."""
    task: str | None = None
    """Value of the env's `task` argument."""
    output_dir: Path = Path("runs/bench")
    """Folder of `bench.json`, `bench.png` and, for a checkpoint's card, `bench.md`."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.repeats < 1 or not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ConfigError(
                f"`repeats` and `batch_sizes` must be positive, got {self.repeats} and {self.batch_sizes}"
            )
        if self.task is not None and self.env is None:
            raise ConfigError("a `task` is an env's: name the `env`")


def reference_step(
    policy: WAMPolicy, way: ReferenceForward, clock: Clock, observation: dict[str, Any]
) -> Tensor:
    """One step of the plain way, timed; its normalised actions."""
    with clock("preprocess"):
        checked = pipeline.read_observation(policy.config, observation)
        seen = pipeline.prepare_input(policy.config, checked)
        image = torch.from_numpy(seen.canvas).to(policy.device, policy.dtype)
        proprio = None
        if seen.proprio is not None:
            proprio = torch.from_numpy(seen.proprio).to(policy.device, policy.dtype)
        request = pipeline.make_request(policy, len(checked))
        noise = request.noise((request.horizon, policy.config.action.layout.dim))
        noise = noise.to(policy.device, sampling.sampling_dtype(way.model))
    with clock("vae"):
        first = way.encode(image)
    with clock("prefill"):
        conditions, cache = way.prefill(first, seen.prompts[0], proprio)
    with clock("act"):
        actions = way.act(conditions, cache, seen.prompts[0], noise)
    with clock("postprocess"):
        pipeline.denormalize_actions(policy.config, actions)
    return actions


def engine_step(policy: WAMPolicy, clock: Clock, observation: dict[str, Any]) -> Tensor:
    """One step of a compiled policy, timed; its normalised actions."""
    engine = policy.engine
    assert engine is not None
    with clock("preprocess"):
        checked = pipeline.read_observation(policy.config, observation)
        seen = pipeline.prepare_input(policy.config, checked)
        bucket = engine.load_batch(seen, pipeline.make_request(policy, len(checked)))
    encodes = engine.reusable_encoding(bucket, seen) is None
    with clock("vae"):
        if encodes:
            bucket.encode_image()
    with clock("prefill"):
        state = engine.encode_or_reuse(bucket, seen)
    if encodes:  # which begins with seeing
        clock.seconds["prefill"][-1] = max(
            0.0, clock.seconds["prefill"][-1] - clock.seconds["vae"][-1]
        )
    with clock("act"):
        actions = bucket.act(state).clone()
    with clock("postprocess"):
        pipeline.denormalize_actions(policy.config, actions)
    return actions


def measure(
    name: str,
    policy: WAMPolicy,
    inputs: ObservationSource,
    batch: int,
    repeats: int,
    way: ReferenceForward | None = None,
) -> tuple[Row, list[Tensor]]:
    """Measure one way of computing: its row, and its actions for each input."""
    clock, actions = Clock(policy.device), []
    with torch.no_grad():
        for i in range(-WARMUPS, repeats):
            if i == 0:
                clock = Clock(policy.device)
                if policy.engine is not None:
                    policy.engine.reset()
            observation = inputs(max(i, 0), batch)
            step = (
                engine_step(policy, clock, observation)
                if way is None
                else reference_step(policy, way, clock, observation)
            )
            if i >= 0:
                actions.append(step.float().cpu())
    return Row(name, batch, clock.seconds, peak=environment.peak_memory(policy.device)), actions


def count_row(policy: WAMPolicy, row: Row, observation: dict[str, Any]) -> None:
    """Count the products of a row's stages for an observation, on our forward pass, not compiled."""
    eager = compile_inference(policy, batch_sizes=(row.batch,), backend=None, warmup=False)
    assert eager.engine is not None
    inputs = pipeline.prepare_input(
        policy.config, pipeline.read_observation(policy.config, observation)
    )
    bucket = eager.engine.load_batch(inputs, pipeline.make_request(policy, row.batch))
    row.counts["vae"] = count_operations(bucket.encode_image)
    states: list[Any] = []
    whole = count_operations(lambda: states.append(bucket.encode()))
    row.counts["prefill"] = whole.minus(row.counts["vae"])
    row.counts["act"] = count_operations(lambda: bucket.act(states[0]))


def bench(config: BenchConfig, console: Console | None = None) -> dict[str, Any]:
    """Measure, print a table, write `bench.json` and `bench.png`, and return what the former holds."""
    console = console or Console()
    policy = WAMPolicy.from_pretrained(resolve_checkpoint(config.checkpoint), device=config.device)
    machine = measure_machine(policy.device, policy.dtype)
    inputs = random_observations(policy)
    if config.env is not None:
        with console.status(f"playing {config.task or config.env}"):
            inputs = rollout_observations(
                policy, config.env, config.task, config.repeats + max(config.batch_sizes)
            )
    rows: list[Row] = []

    def add(
        name: str, batch: int, make: Callable[[], WAMPolicy | ReferenceForward], note: str = ""
    ) -> list[Tensor]:
        gc.collect()
        environment.forget_peak_memory(policy.device)
        with console.status(f"{name}, batch {batch}"):
            made = make()
            way, measured = (made, policy) if isinstance(made, ReferenceForward) else (None, made)
            row, actions = measure(name, measured, inputs, batch, config.repeats, way)
        row.note = note
        rows.append(row)
        return actions

    def compiled(batch: int, **options: Any) -> Callable[[], WAMPolicy]:
        return lambda: compile_inference(policy, batch_sizes=(batch,), **options)

    lean = isinstance(policy.model, LightWAM) and policy.model.config.lean_steps is not None
    if config.savings and not lean:
        names = savings_of(policy)
        add("plain", 1, lambda: ReferenceForward(policy), "as the references compute")
        add("all savings", 1, lambda: ReferenceForward(policy, list(names)), "not compiled")
        for name, text in names.items():
            others = [other for other in names if other != name]
            add(f"without {name}", 1, functools.partial(ReferenceForward, policy, others), text)
    exact: dict[int, list[Tensor]] = {}
    for batch in config.batch_sizes:
        add("eager", batch, compiled(batch, backend=None), "our forward pass")
        exact[batch] = add("compiled", batch, compiled(batch), "the same, compiled")
        count_row(policy, rows[-1], inputs(0, batch))
    batch = config.batch_sizes[0]
    knobs: list[tuple[str, dict[str, Any]]] = [(f"{n} steps", {"steps": n}) for n in config.steps]
    knobs += [(kind, {"quantize": kind}) for kind in config.quantize]
    knobs += [(f"1 of {n} encoded", {"encode_every": n}) for n in config.encode_every]
    for name, options in knobs:
        actions = add(name, batch, compiled(batch, **options), "not exact")
        rows[-1].errors = [
            float((a - b).abs().max()) for a, b in zip(actions, exact[batch], strict=True)
        ]
    found = {
        "checkpoint": config.checkpoint,
        "device": machine.name,
        "dtype": str(policy.dtype).removeprefix("torch."),
        "repeats": config.repeats,
        "machine": machine.to_dict(),
        "rows": [row.to_dict(machine) for row in rows],
        "inputs": "random" if config.env is None else f"{config.env} {config.task or ''}".strip(),
        "versions": environment.versions(),
        "commit": environment.commit(),
    }
    config.output_dir.mkdir(parents=True, exist_ok=True)
    write_text(config.output_dir / "bench.json", json.dumps(found, indent=2) + "\n")
    write_text(config.output_dir / "bench.md", card_section(rows, found))
    write_chart(config.output_dir / "bench.png", rows)
    console.print(benchmark_table(rows, machine))
    console.print(f"results and chart: {config.output_dir}/")
    return found
