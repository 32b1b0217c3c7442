"""Results of an evaluation: episodes appended as they end, their summary, and what they were made with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from wam_policy.errors import ResultsError
from wam_policy.utils.io import write_text

EPISODES = "episodes.jsonl"


@dataclass(frozen=True)
class Episode:
    """One finished episode, a line of `episodes.jsonl`."""

    task: str
    seed: int
    success: bool
    steps: int
    reward: float
    latency_ms: list[float]  # of every chunk predicted in it (a batched call counts whole)


def wilson_interval(successes: int, episodes: int) -> tuple[float, float]:
    """95 % interval of a success rate (Wilson's score interval)."""
    if episodes == 0:
        return 0.0, 1.0
    z, rate = 1.959963984540054, successes / episodes
    centre = (rate + z * z / (2 * episodes)) / (1 + z * z / episodes)
    half = (
        z
        / (1 + z * z / episodes)
        * np.sqrt(rate * (1 - rate) / episodes + z * z / (4 * episodes**2))
    )
    return max(0.0, min(rate, float(centre - half))), min(1.0, max(rate, float(centre + half)))


def checkpoint_hash(place: Path, contract: str) -> str:
    """SHA-256 over what makes a checkpoint act: configs and weights, by name; or one file and the `contract` read beside it."""
    files = (
        [place]
        if place.is_file()
        else sorted([*place.rglob("*.json"), *place.rglob("*.safetensors")])
    )
    digest = hashlib.sha256(contract.encode() if place.is_file() else b"")
    for path in files:
        digest.update(str(path.relative_to(place if place.is_dir() else place.parent)).encode())
        with path.open("rb") as opened:
            while block := opened.read(2**24):
                digest.update(block)
    return digest.hexdigest()


def open_results(folder: Path, settings: Mapping[str, Any]) -> list[Episode]:
    """Make the results folder, or take up an earlier evaluation of the same settings: its finished episodes.

    Raises:
        ResultsError: the folder holds results of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run, text = folder / "run.json", json.dumps(settings, indent=2)
    if run.is_file() and run.read_text() != text:
        raise ResultsError(
            f"{folder} holds results of another {', '.join(settings)}; choose another folder or remove it"
        )
    write_text(run, text)
    path = folder / EPISODES
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) != len(lines):  # killed while a line was written
        write_text(path, "".join(whole))
    return [Episode(**json.loads(line)) for line in whole]


def append_episode(folder: Path, episode: Episode) -> None:
    """Add a finished episode to the file; on disk when this returns."""
    with (folder / EPISODES).open("a") as file:
        file.write(json.dumps(dataclasses.asdict(episode)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def summarize(episodes: list[Episode], tasks: list[str]) -> dict[str, Any]:
    """Success per task with its 95 % interval, its mean over tasks, and latency."""
    rows = {}
    for task in tasks:
        mine = [e for e in episodes if e.task == task]
        wins = sum(e.success for e in mine)
        rows[task] = {
            "success": wins / max(1, len(mine)),
            "episodes": len(mine),
            "interval": list(wilson_interval(wins, len(mine))),
            "mean_steps": float(np.mean([e.steps for e in mine])) if mine else None,
            "mean_steps_of_successes": float(np.mean([e.steps for e in mine if e.success]))
            if wins
            else None,
        }
    latency = [ms for e in episodes for ms in e.latency_ms]
    return {
        "mean_success": float(np.mean([row["success"] for row in rows.values()])),
        "tasks": rows,
        "latency_ms": {
            "median": float(np.median(latency)),
            "p95": float(np.quantile(latency, 0.95)),
        },
    }


def results_table(summary: dict[str, Any]) -> Table:
    """A summary for the terminal."""
    latency = summary["latency_ms"]
    rows = Table(
        caption=f"latency of a chunk: median {latency['median']:.0f} ms, p95 {latency['p95']:.0f} ms"
    )
    for column in ("task", "success", "95 % interval", "episodes", "steps to success"):
        rows.add_column(column, justify="left" if column == "task" else "right")
    for task, row in summary["tasks"].items():
        low, high = row["interval"]
        steps = row["mean_steps_of_successes"]
        rows.add_row(
            task,
            f"{row['success']:.0%}",
            f"{low:.0%} … {high:.0%}",
            str(row["episodes"]),
            "-" if steps is None else f"{steps:.0f}",
        )
    rows.add_row("mean", f"{summary['mean_success']:.1%}", "", "", "", style="bold")
    return rows


def imagination_table(summary: dict[str, Any], stride: int) -> Table:
    """How alike imagined and real futures are, for the terminal."""
    scores = summary["imagination"]
    frames = max(len(score["psnr_db"]) for score in scores.values())
    rows = Table(
        caption="PSNR of imagined frames, dB; in brackets: of the observed frame kept still"
    )
    rows.add_column("steps ahead")
    for k in range(1, frames + 1):
        rows.add_column(str(k * stride), justify="right")
    for task, score in scores.items():
        pairs = zip(score["psnr_db"], score["still_psnr_db"], strict=True)
        rows.add_row(task, *(f"{imagined:.1f} ({still:.1f})" for imagined, still in pairs))
    return rows
