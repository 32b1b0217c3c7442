"""Measures how lean a full-size policy loads: peak memory, and time against reading the same files.

    python benchmarks/load.py [--family fast_wam|light_wam] [--folder runs/full-size] [--repeats 3]

Writes a LIBERO checkpoint of random bfloat16 weights once: a Fast-WAM (13.5 GB with its codec), or the lean form of a Light-WAM
(3.1 GB). Then each measurement is a process of its own: *read* reads the weight files through the page cache; *load* is
`from_pretrained` and a read of every weight's every page, as loading alone only maps them; *predict* answers one observation.
The files are dropped from the page cache before each (cold), then both are done again with the files in it (warm). The last
line is of the cold medians.
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
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from random_policy import full, write

from wam_policy import WAMPolicy
from wam_policy.config import Family
from wam_policy.hub import checkpoint
from wam_policy.profiling.observations import random_observation
from wam_policy.utils.environment import peak_memory

GIB = 2**30
Stage = Literal["read", "load", "predict"]


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """The benchmark."""

    family: Family = "fast_wam"
    folder: Path | None = None
    """Where the random checkpoint is, or will be; the default is runs/full-size-FAMILY."""
    repeats: int = 3
    stage: Stage | None = None
    """Used by the benchmark itself: one measurement, in this process."""


def weight_files(folder: Path) -> list[Path]:
    """The shards of the model, without its codec and prompts."""
    return sorted(folder.glob("model*.safetensors"))


def read(folder: Path) -> dict[str, Any]:
    """Read the weight files, 16 MiB at a time."""
    buffer = bytearray(2**24)
    began = time.perf_counter()
    for path in weight_files(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return {"seconds": time.perf_counter() - began}


def load(folder: Path) -> dict[str, Any]:
    """Load the policy and touch every page of its weights."""
    began = time.perf_counter()
    policy = WAMPolicy.from_pretrained(folder)
    mapped = time.perf_counter() - began
    for parameter in policy.model.parameters():
        parameter.detach().view(torch.uint8).flatten()[::4096].sum()
    return {
        "seconds": time.perf_counter() - began,
        "mapped": mapped,
        "peak": peak_memory(torch.device("cpu")),
    }


def predict(folder: Path) -> dict[str, Any]:
    """Load the policy and answer one LIBERO observation."""
    policy = WAMPolicy.from_pretrained(folder)
    seen = random_observation(policy, 1, 0)
    began = time.perf_counter()
    chunk = policy.predict_chunk(seen)
    seconds = time.perf_counter() - began
    assert chunk.shape == (32, 7) and np.isfinite(chunk).all()
    return {"seconds": seconds, "peak": peak_memory(torch.device("cpu"))}


STAGES: dict[Stage, Callable[[Path], dict[str, Any]]] = {
    "read": read,
    "load": load,
    "predict": predict,
}


def run(stage: Stage, folder: Path, *, cold: bool) -> dict[str, Any]:
    """One measurement in a fresh process."""
    for path in weight_files(folder):
        with path.open("rb") as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, __file__, "--folder", str(folder), "--stage", stage]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main(config: LoadConfig) -> None:
    """Run the benchmark, or one measurement of it."""
    folder = config.folder or Path(f"runs/full-size-{config.family}")
    if config.stage is not None:
        print(json.dumps(STAGES[config.stage](folder)))
        return
    if not (folder / checkpoint.CONFIG).is_file():
        print(f"writing {folder} …", flush=True)
        write(folder, full(config.family), "fat" if config.family == "fast_wam" else "lean")
        os.sync()
    size = sum(path.stat().st_size for path in weight_files(folder))
    whole = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    print(f"weight files {size / GIB:.2f} GiB, {whole / GIB:.2f} GiB with codec and prompts")
    ratios, peaks = {}, []
    for cold in (True, False):
        seconds: dict[Stage, list[float]] = {"read": [], "load": []}
        mapped = []
        for _ in range(config.repeats):
            for stage in ("read", "load"):
                found = run(stage, folder, cold=cold)
                seconds[stage].append(found["seconds"])
                if stage == "load":
                    peaks.append(found["peak"])
                    mapped.append(found["mapped"])
        middle = {stage: statistics.median(values) for stage, values in seconds.items()}
        ratios[cold] = middle["load"] / middle["read"]
        print(
            f"{'cold' if cold else 'warm'}: load {middle['load']:.1f} s ({statistics.median(mapped):.1f} s until mapped), "
            f"read {middle['read']:.1f} s, ratio {ratios[cold]:.2f}",
            flush=True,
        )
    print(f"peak RSS of load, every page touched: {max(peaks) / GIB:.2f} GiB")
    answered = run("predict", folder, cold=False)
    print(
        f"predict_chunk, bfloat16, CPU: {answered['seconds']:.0f} s, peak RSS {answered['peak'] / GIB:.2f} GiB"
    )
    print(f"peak_minus_file_gib={(max(peaks) - size) / GIB:.3f} load_over_read={ratios[True]:.3f}")


if __name__ == "__main__":
    main(tyro.cli(LoadConfig, description=__doc__))
