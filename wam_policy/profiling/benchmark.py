"""The command `wam bench`, which measures what a control step costs, stage by stage.

It compares the compiled policy with the uncompiled one, with a reference forward pass that has
each exact saving left out, with settings that trade accuracy for speed, and with a roofline of the
machine.
"""

# B batch, T actions in a chunk, A numbers per action

from __future__ import annotations

import functools
import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
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
from wam_policy.profiling.roofline import Machine, measure_machine
from wam_policy.utils import environment, memory
from wam_policy.utils.io import write_text

# Untimed steps before the timed ones: they compile what is compiled on first use and fill caches.
WARMUPS = 2


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Measurement of a checkpoint's control step."""

    checkpoint: str = "embedded:metaworld-fast-wam"
    """Folder, file of a known release, Hub id, or "embedded:<name>"."""
    batch_sizes: tuple[int, ...] = (1, 4)
    """Observations per call."""
    repeats: int = 20
    """Timed steps of each forward pass."""
    savings: bool = True
    """Also measure the uncompiled step without each exact saving, one observation per call."""
    steps: tuple[int, ...] = ()
    """Also measure these numbers of denoising steps, and the error that they cause."""
    quantize: tuple[Quantization, ...] = ()
    """Also measure these quantizations by torchao, and the error that they cause."""
    encode_every: tuple[int, ...] = ()
    """Also measure encoding one observation per so many calls, and the error that this causes."""
    env: str | None = None
    """Gymnasium id of an env whose rollouts give the observations; by default they are random."""
    task: str | None = None
    """Value of the env's `task` argument."""
    output_dir: Path = Path("runs/bench")
    """Folder of `bench.json`, `bench.png` and, for a checkpoint's card, `bench.md`."""
    device: str = "cpu"
    """Device to measure on."""

    def __post_init__(self) -> None:
        if self.repeats < 1 or not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ConfigError(
                f"`repeats` and `batch_sizes` must be positive, "
                f"got {self.repeats} and {self.batch_sizes}"
            )
        if self.task is not None and self.env is None:
            raise ConfigError(
                f"`task` is an argument of an env, got {self.task!r} without one: name the `env`"
            )


# -- one step ----------------------------------------------------------------------------------


def reference_step(
    policy: WAMPolicy, reference: ReferenceForward, clock: Clock, observation: dict[str, Any]
) -> Tensor:
    """Run and time one step of a reference forward pass.

    Args:
        policy: Policy that the forward pass belongs to.
        reference: Forward pass to run.
        clock: Receives the seconds of each stage.
        observation: Batch of observations with one instruction.

    Returns:
        [B, T, A] normalised actions.
    """
    with clock("preprocess"):
        checked = pipeline.read_observation(policy.config, observation)
        inputs = pipeline.prepare_input(policy.config, checked)
        image = torch.from_numpy(inputs.canvas).to(policy.device, policy.dtype)
        proprio = None
        if inputs.proprio is not None:
            proprio = torch.from_numpy(inputs.proprio).to(policy.device, policy.dtype)
        request = pipeline.make_request(policy, len(checked))
        noise = request.noise((request.horizon, policy.config.action.layout.dim))
        noise = noise.to(policy.device, sampling.sampling_dtype(reference.model))

    prompt = inputs.prompts[0]
    with clock("vae"):
        first_frame = reference.encode(image)
    with clock("prefill"):
        conditions, cache = reference.prefill(first_frame, prompt, proprio)
    with clock("act"):
        actions = reference.act(conditions, cache, prompt, noise)
    with clock("postprocess"):
        pipeline.denormalize_actions(policy.config, actions)
    return actions


def engine_step(policy: WAMPolicy, clock: Clock, observation: dict[str, Any]) -> Tensor:
    """Run and time one step of a compiled policy.

    Args:
        policy: Policy with an engine.
        clock: Receives the seconds of each stage.
        observation: Batch of observations.

    Returns:
        [B, T, A] normalised actions.
    """
    engine = policy.engine
    assert engine is not None
    with clock("preprocess"):
        checked = pipeline.read_observation(policy.config, observation)
        inputs = pipeline.prepare_input(policy.config, checked)
        bucket = engine.load_batch(inputs, pipeline.make_request(policy, len(checked)))

    encodes = engine.reusable_encoding(bucket, inputs) is None
    with clock("vae"):
        if encodes:
            bucket.encode_image()
    with clock("prefill"):
        state = engine.encode_or_reuse(bucket, inputs)
    # The compiled `encode` runs the codec again, so its time is taken off.
    if encodes:
        prefill_seconds = clock.seconds["prefill"][-1] - clock.seconds["vae"][-1]
        clock.seconds["prefill"][-1] = max(0.0, prefill_seconds)

    with clock("act"):
        actions = bucket.act(state).clone()
    with clock("postprocess"):
        pipeline.denormalize_actions(policy.config, actions)
    return actions


# -- one row -----------------------------------------------------------------------------------


def measure(
    name: str,
    policy: WAMPolicy,
    inputs: ObservationSource,
    batch: int,
    repeats: int,
    reference: ReferenceForward | None = None,
) -> tuple[Row, list[Tensor]]:
    """Measure one form of the forward pass at one batch size.

    Args:
        name: Name of the row.
        policy: Policy to measure, with an engine unless `reference` is given.
        inputs: Source of observations.
        batch: Observations per call.
        repeats: Timed steps.
        reference: Reference forward pass to measure instead of the policy's engine.

    Returns:
        The row, and the normalised actions [B, T, A] of each timed step, float32 on the CPU.
    """

    def step(clock: Clock, i: int) -> Tensor:
        observation = inputs(i, batch)
        if reference is None:
            return engine_step(policy, clock, observation)
        return reference_step(policy, reference, clock, observation)

    clock = Clock(policy.device)
    actions = []
    with torch.no_grad():
        warmup_clock = Clock(policy.device)
        for _ in range(WARMUPS):
            step(warmup_clock, 0)

        # The first timed step must encode its observation, as at the start of an episode.
        if policy.engine is not None:
            policy.engine.reset()
        for i in range(repeats):
            actions.append(step(clock, i).float().cpu())
    return Row(name, batch, clock.seconds, peak=memory.peak_memory(policy.device)), actions


def count_row(policy: WAMPolicy, row: Row, observation: dict[str, Any]) -> None:
    """Count the matrix products of each stage and store the counts in a row.

    They are counted on the uncompiled engine, whose operators the counter can see.
    """
    eager = compile_inference(policy, batch_sizes=(row.batch,), backend=None, warmup=False)
    assert eager.engine is not None
    checked = pipeline.read_observation(policy.config, observation)
    inputs = pipeline.prepare_input(policy.config, checked)
    bucket = eager.engine.load_batch(inputs, pipeline.make_request(policy, row.batch))

    row.counts["vae"] = count_operations(bucket.encode_image)
    states: list[Any] = []
    encode_counts = count_operations(lambda: states.append(bucket.encode()))
    row.counts["prefill"] = encode_counts.minus(row.counts["vae"])
    row.counts["act"] = count_operations(lambda: bucket.act(states[0]))


# -- the benchmark -----------------------------------------------------------------------------


@dataclass
class _Session:
    """A benchmark in progress: what it measures, and the rows so far."""

    config: BenchConfig
    policy: WAMPolicy
    inputs: ObservationSource
    console: Console
    rows: list[Row] = field(default_factory=list)

    def measure_reference(self, name: str, savings: Sequence[str], note: str) -> None:
        """Add a row of the reference forward pass with some savings, at batch size 1."""
        build = functools.partial(ReferenceForward, self.policy, savings)
        self._add_row(name, 1, build, note)

    def measure_engine(self, name: str, batch: int, note: str, **options: Any) -> list[Tensor]:
        """Add a row of the policy compiled with options; return the actions of its steps."""
        build = functools.partial(compile_inference, self.policy, batch_sizes=(batch,), **options)
        return self._add_row(name, batch, build, note)

    def _add_row(
        self, name: str, batch: int, build: Callable[[], WAMPolicy | ReferenceForward], note: str
    ) -> list[Tensor]:
        """Build a form of the forward pass, measure it and add its row."""
        # Earlier forms must be gone before the peak of this one is taken.
        gc.collect()
        memory.reset_peak_memory(self.policy.device)

        repeats = self.config.repeats
        with self.console.status(f"{name}, batch {batch}"):
            built = build()
            if isinstance(built, ReferenceForward):
                row, actions = measure(name, self.policy, self.inputs, batch, repeats, built)
            else:
                row, actions = measure(name, built, self.inputs, batch, repeats)
        row.note = note
        self.rows.append(row)
        return actions


def bench(config: BenchConfig, console: Console | None = None) -> dict[str, Any]:
    """Measure a checkpoint, print a table, and write `bench.json`, `bench.md` and `bench.png`.

    Args:
        config: What to measure.
        console: Where to print; None prints to the terminal.

    Returns:
        The contents of `bench.json`.
    """
    console = console or Console()
    policy = WAMPolicy.from_pretrained(resolve_checkpoint(config.checkpoint), device=config.device)
    machine = measure_machine(policy.device, policy.dtype)
    inputs = _observation_source(config, policy, console)

    session = _Session(config, policy, inputs, console)
    # A lean Light-WAM has its savings folded into the weights.
    is_lean = isinstance(policy.model, LightWAM) and policy.model.config.lean_steps is not None
    if config.savings and not is_lean:
        _measure_savings(session)
    exact_actions = _measure_compilation(session)
    _measure_inexact_settings(session, exact_actions)

    results = _results(session, machine)
    _write_results(config.output_dir, session.rows, results)
    console.print(benchmark_table(session.rows, machine))
    console.print(f"results and chart: {escape(str(config.output_dir))}/")
    return results


def _observation_source(
    config: BenchConfig, policy: WAMPolicy, console: Console
) -> ObservationSource:
    """Return random observations or, if an env is named, those of rollouts in it."""
    if config.env is None:
        return random_observations(policy)
    count = config.repeats + max(config.batch_sizes)
    with console.status(f"playing {escape(config.task or config.env)}"):
        return rollout_observations(policy, config.env, config.task, count)


def _measure_savings(session: _Session) -> None:
    """Measure the reference forward pass with no saving, with all, and with all but one."""
    savings = savings_of(session.policy)
    session.measure_reference("plain", [], "as the reference implementations compute")
    session.measure_reference("all savings", list(savings), "uncompiled")
    for name, description in savings.items():
        others = [other for other in savings if other != name]
        session.measure_reference(f"without {name}", others, description)


def _measure_compilation(session: _Session) -> list[Tensor]:
    """Measure the engine uncompiled and compiled at each batch size.

    Returns:
        The actions of the compiled engine's steps at the first batch size.
    """
    compiled_actions = []
    for batch in session.config.batch_sizes:
        session.measure_engine("eager", batch, "the engine, uncompiled", backend=None)
        actions = session.measure_engine("compiled", batch, "the engine, compiled")
        compiled_actions.append(actions)
        count_row(session.policy, session.rows[-1], session.inputs(0, batch))
    return compiled_actions[0]


def _measure_inexact_settings(session: _Session, exact_actions: Sequence[Tensor]) -> None:
    """Measure the settings that trade accuracy for speed, and their errors.

    Args:
        session: Benchmark in progress.
        exact_actions: Actions of the compiled engine on the same observations.
    """
    config = session.config
    batch = config.batch_sizes[0]
    settings: list[tuple[str, dict[str, Any]]] = []
    settings += [(f"{steps} steps", {"steps": steps}) for steps in config.steps]
    settings += [(kind, {"quantize": kind}) for kind in config.quantize]
    settings += [(f"1 of {n} encoded", {"encode_every": n}) for n in config.encode_every]

    for name, options in settings:
        actions = session.measure_engine(name, batch, "not exact", **options)
        session.rows[-1].errors = [
            float((approximate - exact).abs().max())
            for approximate, exact in zip(actions, exact_actions, strict=True)
        ]


def _results(session: _Session, machine: Machine) -> dict[str, Any]:
    """Return the contents of `bench.json`."""
    config = session.config
    inputs = "random"
    if config.env is not None:
        inputs = f"{config.env} {config.task or ''}".strip()
    return {
        "checkpoint": config.checkpoint,
        "device": machine.name,
        "dtype": str(session.policy.dtype).removeprefix("torch."),
        "repeats": config.repeats,
        "machine": machine.to_dict(),
        "rows": [row.to_dict(machine) for row in session.rows],
        "inputs": inputs,
        "versions": environment.versions(),
        "commit": environment.commit(),
    }


def _write_results(output_dir: Path, rows: Sequence[Row], results: dict[str, Any]) -> None:
    """Write the results as JSON, as a section of a checkpoint's card, and as a chart."""
    output_dir.mkdir(parents=True, exist_ok=True)
    write_text(output_dir / "bench.json", json.dumps(results, indent=2) + "\n")
    write_text(output_dir / "bench.md", card_section(rows, results))
    write_chart(output_dir / "bench.png", rows)
