"""Timings of a control step, stage by stage."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from wam_policy.profiling.op_counter import Counts
from wam_policy.profiling.roofline import Machine

STAGES = ("preprocess", "vae", "prefill", "act", "postprocess")

# Seconds below which a stage's median is not used as a divisor.
MIN_SECONDS = 1e-12


class Clock:
    """A stopwatch for the stages of a step; it holds one time per stage and run."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, list[float]] = {stage: [] for stage in STAGES}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time the body of a `with` statement, including its work on the device."""
        start = time.perf_counter()
        yield
        # Kernels run asynchronously: without waiting, only their launches would be timed.
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[stage].append(time.perf_counter() - start)


@dataclass
class Row:
    """The measurements of one form of the forward pass at one batch size."""

    name: str
    batch: int
    seconds: dict[str, list[float]]  # per stage, one time per run
    counts: dict[str, Counts] = field(default_factory=dict)  # per counted stage
    # Per run, the largest difference of a normalised action from the exact policy's.
    errors: Sequence[float] = ()
    peak: int | None = None  # bytes; None where the system does not report it
    note: str = ""

    def total(self, quantile: float = 0.5) -> float:
        """Return a quantile of the seconds of whole steps."""
        stages_per_run = zip(*self.seconds.values(), strict=True)
        steps = [sum(stages) for stages in stages_per_run]
        return float(np.quantile(steps, quantile))

    def to_dict(self, machine: Machine) -> dict[str, Any]:
        """Return the row as JSON values, compared with the rates of a machine."""
        stages = {stage: self._stage_to_dict(stage, machine) for stage in self.seconds}
        total = {"median_s": self.total(), "p95_s": self.total(0.95)}
        return {
            "name": self.name,
            "batch": self.batch,
            "total": total,
            "stages": stages,
            "errors": list(self.errors),
            "peak_memory_bytes": self.peak,
            "note": self.note,
        }

    def _stage_to_dict(self, stage: str, machine: Machine) -> dict[str, float]:
        """Return one stage as JSON values.

        `of_machine` is the share of the machine's rates that the stage reaches: the lower bound
        on the time of its products, divided by its median time.
        """
        median = float(np.median(self.seconds[stage]))
        values = {"median_s": median, "p95_s": float(np.quantile(self.seconds[stage], 0.95))}
        if stage in self.counts:
            counts = self.counts[stage]
            values["flops"] = counts.flops
            values["bytes"] = counts.bytes
            values["eager_kernels"] = counts.kernels
            values["of_machine"] = machine.minimum_seconds(counts) / max(median, MIN_SECONDS)
        return values
