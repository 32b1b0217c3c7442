"""`wam compare`: the same evaluation of several checkpoints, one after the other."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from wam_policy.errors import ConfigError, ResultsError
from wam_policy.evaluation.config import METAWORLD_TASKS
from wam_policy.evaluation.results import SUMMARY
from wam_policy.utils.io import write_text
from wam_policy.wrappers.perturbations import check_perturbations


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """The same evaluation of several checkpoints."""

    checkpoints: tuple[str, ...] = ("embedded:metaworld-fast-wam", "embedded:metaworld-light-wam")
    """Folders, Hub ids, or "embedded:<name>"."""
    env: str = "wam_policy/MetaWorld-v0"
    """Gymnasium env id."""
    tasks: tuple[str, ...] = METAWORLD_TASKS
    """Values of the env's `task` argument."""
    env_kwargs: dict[str, str] = field(default_factory=dict)
    """Other arguments of the env, NAME VALUE …, for example `size 128`."""
    protocol: str | None = None
    """Named protocol of LIBERO, see `wam eval --help`."""
    suite: tuple[str, ...] = ()
    """Suites of LIBERO or LIBERO-PRO that the protocol plays all tasks of."""
    perturb: dict[str, int] = field(default_factory=dict)
    """Perturbations of the env by severity 1 to 5, NAME SEVERITY …, for example `camera 3`."""
    episodes: int = 50
    """Episodes per task and checkpoint; episode i uses the seed `seed + i`."""
    num_envs: int = 2
    """Number of sub-envs, one process each; one batched forward pass drives all of them."""
    seed: int = 0
    """Seed of the first episode."""
    output_dir: Path = Path("runs/compare")
    """Folder for the results, one subfolder per checkpoint; a restart resumes from it."""
    max_steps: int | None = None
    """Steps after which an episode is truncated, see `wam eval --help`."""
    device: str = "cpu"
    """PyTorch device that the policies run on."""

    def __post_init__(self) -> None:
        check_perturbations(self.perturb)
        names = [checkpoint_name(checkpoint) for checkpoint in self.checkpoints]
        if not names or len(set(names)) != len(names):
            raise ConfigError(
                f"`checkpoints` must name at least one checkpoint, and no two with the same last "
                f"path component, got {names}; add one, or rename or copy the folders"
            )


def checkpoint_name(checkpoint: str) -> str:
    """Return the name of a checkpoint in the table."""
    return checkpoint.removeprefix("embedded:").rstrip("/").split("/")[-1]


def compare(config: CompareConfig, console: Console | None = None) -> dict[str, Any]:
    """Evaluate each checkpoint, and print a table with one row per checkpoint.

    Each evaluation is a process of its own, so that the peak memory is that of one policy.

    Args:
        config: Options of the comparison.
        console: Where the table is printed; the default is the terminal.

    Returns:
        The content of each checkpoint's `summary.json`, by the checkpoint's name.

    Raises:
        ResultsError: An evaluation failed.
    """
    summaries = {}
    for checkpoint in config.checkpoints:
        name = checkpoint_name(checkpoint)
        output_dir = config.output_dir / name

        command = _eval_command(config, checkpoint, output_dir)
        code = subprocess.run(command, check=False).returncode
        if code != 0:
            raise ResultsError(
                f"the evaluation of {checkpoint!r} ended with code {code}; "
                f"its results so far are in {output_dir}, and the comparison resumes from them"
            )
        summaries[name] = json.loads((output_dir / SUMMARY).read_text(encoding="utf-8"))

    write_text(config.output_dir / SUMMARY, json.dumps(summaries, indent=2) + "\n")
    console = console or Console()
    console.print(comparison_table(summaries))
    return summaries


def _eval_command(config: CompareConfig, checkpoint: str, output_dir: Path) -> list[str]:
    """Return the command line that evaluates one checkpoint."""
    # `--no-video`: the comparison shows numbers only.
    options = {
        "--checkpoint": [checkpoint],
        "--env": [config.env],
        "--tasks": [*config.tasks],
        "--episodes": [str(config.episodes)],
        "--num-envs": [str(config.num_envs)],
        "--seed": [str(config.seed)],
        "--output-dir": [str(output_dir)],
        "--device": [config.device],
        "--no-video": [],
    }
    if config.max_steps is not None:
        options["--max-steps"] = [str(config.max_steps)]
    if config.env_kwargs:
        options["--env-kwargs"] = [text for pair in config.env_kwargs.items() for text in pair]
    if config.protocol is not None:
        options["--protocol"] = [config.protocol]
    if config.suite:
        options["--suite"] = [*config.suite]
    if config.perturb:
        pairs = config.perturb.items()
        options["--perturb"] = [str(value) for pair in pairs for value in pair]
    command = [sys.executable, "-m", "wam_policy.cli", "eval"]
    for option, values in options.items():
        command += [option, *values]
    return command


def comparison_table(summaries: dict[str, Any]) -> Table:
    """Return the comparison as a table for the terminal.

    Args:
        summaries: Content of each checkpoint's `summary.json`, by name; all of the same tasks.
    """
    tasks = list(next(iter(summaries.values()))["tasks"])
    table = Table(
        caption=(
            "latency: one chunk for all sub-envs; memory: the policy's process without simulators"
        )
    )
    table.add_column("checkpoint", justify="left")
    for column in ("parameters", *tasks, "mean", "median ms", "p95 ms", "peak MiB"):
        table.add_column(escape(column), justify="right")

    # One row per checkpoint.
    for name, summary in summaries.items():
        success_rates = [f"{summary['tasks'][task]['success']:.0%}" for task in tasks]
        peak = summary["peak_memory_bytes"]
        table.add_row(
            escape(name),
            f"{summary['parameters'] / 1e6:.2f} M",
            *success_rates,
            f"{summary['mean_success']:.1%}",
            f"{summary['latency_ms']['median']:.0f}",
            f"{summary['latency_ms']['p95']:.0f}",
            "-" if peak is None else f"{peak / 2**20:.0f}",
        )
    return table
