"""`wam compare`: several checkpoints measured by the same evaluation, one after the other, a row each."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from wam_policy.errors import ConfigError, ResultsError
from wam_policy.evaluation.evaluate import METAWORLD_TASKS
from wam_policy.utils.io import write_text


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """One evaluation of several checkpoints."""

    checkpoints: tuple[str, ...] = ("embedded:metaworld-fast-wam", "embedded:metaworld-light-wam")
    """Folders, Hub ids, or "embedded:<name>"."""
    env: str = "wam_policy/MetaWorld-v0"
    """Gymnasium env id."""
    tasks: tuple[str, ...] = METAWORLD_TASKS
    """Values of the env's `task` argument."""
    episodes: int = 50
    """Episodes per task and checkpoint; episode i starts from seed + i."""
    num_envs: int = 2
    """Sub-envs, one process each, driven by one batched forward."""
    seed: int = 0
    """First seed."""
    output_dir: Path = Path("runs/compare")
    """Folder of the results, a folder for each checkpoint; started again, it goes on where it was."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        names = [name_of(checkpoint) for checkpoint in self.checkpoints]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"the checkpoints to compare need names of their own, got {names}")


def name_of(checkpoint: str) -> str:
    """What a checkpoint is called in the table."""
    return checkpoint.removeprefix("embedded:").rstrip("/").split("/")[-1]


def compare(config: CompareConfig, console: Console | None = None) -> dict[str, Any]:
    """Evaluate each checkpoint in a process of its own, so that its peak memory is its own; print and return the rows.

    Raises:
        ResultsError: an evaluation failed.
    """
    summaries = {}
    for checkpoint in config.checkpoints:
        name = name_of(checkpoint)
        out = config.output_dir / name
        command = [
            sys.executable,
            "-m",
            "wam_policy.cli",
            "eval",
            "--checkpoint",
            checkpoint,
            "--env",
            config.env,
        ]
        command += [
            "--tasks",
            *config.tasks,
            "--episodes",
            str(config.episodes),
            "--num-envs",
            str(config.num_envs),
        ]
        command += [
            "--seed",
            str(config.seed),
            "--output-dir",
            str(out),
            "--device",
            config.device,
            "--no-video",
        ]
        if (code := subprocess.run(command, check=False).returncode) != 0:
            raise ResultsError(
                f"the evaluation of {checkpoint!r} ended with code {code}; its results so far are in {out}"
            )
        summaries[name] = json.loads((out / "summary.json").read_text())
    write_text(config.output_dir / "summary.json", json.dumps(summaries, indent=2) + "\n")
    (console or Console()).print(comparison_table(summaries, config.tasks))
    return summaries


def comparison_table(summaries: dict[str, Any], tasks: tuple[str, ...]) -> Table:
    """The rows, for the terminal."""
    rows = Table(
        caption="latency: one chunk of all sub-envs; memory: the policy's process, simulators apart"
    )
    columns = ("checkpoint", "parameters", *tasks, "mean", "median ms", "p95 ms", "peak MiB")
    for column in columns:
        rows.add_column(column, justify="left" if column == "checkpoint" else "right")
    for name, summary in summaries.items():
        peak = summary["peak_memory_bytes"]
        rows.add_row(
            name,
            f"{summary['parameters'] / 1e6:.2f} M",
            *(f"{summary['tasks'][task]['success']:.0%}" for task in tasks),
            f"{summary['mean_success']:.1%}",
            f"{summary['latency_ms']['median']:.0f}",
            f"{summary['latency_ms']['p95']:.0f}",
            "-" if peak is None else f"{peak / 2**20:.0f}",
        )
    return rows
