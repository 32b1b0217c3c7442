"""What a machine can do at best: how fast it multiplies matrices and reads memory; the roof that a step is held against."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from wam_policy.models.layers.linear import linear
from wam_policy.profiling.op_counter import Counts

ROWS, WIDTH = (
    512,
    3072,
)  # of the product that is timed: a few hundred tokens, the released model's width
READ = 2**28  # numbers of four bytes that are read


@dataclass(frozen=True)
class Machine:
    """Measured rates."""

    name: str
    flops: float  # per second, of matrix products in the policy's dtype
    bytes: float  # per second, read from memory

    def minimum_seconds(self, counts: Counts) -> float:
        """The time that products need at least: they are bound by arithmetic or by memory."""
        return max(counts.flops / self.flops, counts.bytes / self.bytes)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    def describe(self) -> str:
        """In words."""
        return f"{self.name}: products {self.flops / 1e9:.0f} GFLOP/s, memory {self.bytes / 1e9:.1f} GB/s, both measured"


@torch.no_grad()
def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Time a matrix product and a sum over a large tensor."""
    x, weight = (torch.randn(rows, WIDTH, device=device, dtype=dtype) for rows in (ROWS, WIDTH))
    product = _seconds(lambda: linear(x, weight, None), device)
    numbers = torch.ones(READ if device.type == "cuda" else READ // 4, device=device)
    read = _seconds(numbers.sum, device)
    return Machine(_name(device), 2 * ROWS * WIDTH**2 / product, numbers.numel() * 4 / read)


def _seconds(function: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """The fastest of a few runs."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"
