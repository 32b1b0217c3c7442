"""The timings of one way of computing a control step."""

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


class Clock:
    """Seconds of each stage, one number per run."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, list[float]] = {stage: [] for stage in STAGES}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time what happens inside, the device's work included."""
        began = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[stage].append(time.perf_counter() - began)


@dataclass
class Row:
    """One way of computing, at one batch size."""

    name: str
    batch: int
    seconds: dict[str, list[float]]  # stage -> of each run
    counts: dict[str, Counts] = field(default_factory=dict)  # of stages
    errors: Sequence[
        float
    ] = ()  # of each run: largest difference of a normalised action from the exact policy's
    peak: int | None = None  # bytes
    note: str = ""

    def total(self, quantile: float = 0.5) -> float:
        """Seconds of the whole step."""
        return float(
            np.quantile([sum(run) for run in zip(*self.seconds.values(), strict=True)], quantile)
        )

    def to_dict(self, machine: Machine) -> dict[str, Any]:
        """As JSON holds it; a stage's part of the machine is the time its products need at the least, over its time."""
        stages = {}
        for stage, seconds in self.seconds.items():
            stages[stage] = {
                "median_s": float(np.median(seconds)),
                "p95_s": float(np.quantile(seconds, 0.95)),
            }
            if stage in self.counts:
                counts = self.counts[stage]
                stages[stage] |= {
                    "flops": counts.flops,
                    "bytes": counts.bytes,
                    "eager_kernels": counts.kernels,
                }
                stages[stage] |= {
                    "of_machine": machine.minimum_seconds(counts)
                    / max(stages[stage]["median_s"], 1e-12)
                }
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
