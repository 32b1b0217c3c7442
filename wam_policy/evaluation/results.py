"""Files and tables of an evaluation: finished episodes, their summary, and their settings."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.markup import escape
from rich.table import Table

from wam_policy.errors import ConfigError, ResultsError
from wam_policy.evaluation.metrics import wilson_interval
from wam_policy.utils import documents
from wam_policy.utils.io import explained_write_errors, write_bytes, write_text
from wam_policy.utils.json_dataclass import from_plain

RUN = "run.json"
EPISODES = "episodes.jsonl"
FAILURES = "failures.jsonl"
SUMMARY = "summary.json"
FAILED = "failed"
HASH_BLOCK_BYTES = 2**24

_CURE = "choose another folder or remove it"


@dataclass(frozen=True)
class Episode:
    """One finished episode, a line of `episodes.jsonl`."""

    task: str
    seed: int
    success: bool
    steps: int
    reward: float
    # Milliseconds of every chunk predicted in the episode; the time of a batched call counts in
    # full for each of its sub-envs.
    latency_ms: list[float]


@dataclass(frozen=True)
class Failure:
    """A simulator that failed in an episode, a line of `failures.jsonl`."""

    task: str
    seed: int
    attempt: int
    reason: str


@dataclass(frozen=True)
class LastFrame:
    """What the policy saw at the end of an episode that failed, a file of the folder `failed`."""

    task: str
    seed: int
    image: np.ndarray  # uint8 [H, W, 3], the cameras in a row


# What playing episodes yields; a last frame comes before its episode.
Result = Episode | Failure | LastFrame


def _file_name(task: str) -> str:
    """Return a task's name without the separators of folders."""
    return task.replace("/", "_")


def last_frame_path(folder: Path, task: str, seed: int) -> Path:
    """Return the path of the last frame of an episode that failed."""
    return folder / FAILED / f"{_file_name(task)}_{seed}.png"


def write_last_frame(folder: Path, frame: LastFrame) -> None:
    """Write the last frame of an episode that failed."""
    path = last_frame_path(folder, frame.task, frame.seed)
    with explained_write_errors(path):
        path.parent.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    Image.fromarray(frame.image).save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def video_path(folder: Path, task: str, suffix: str = "") -> Path:
    """Return the path of a task's video in a results folder.

    Args:
        folder: Results folder.
        task: Name of the task.
        suffix: What the video shows: "" an episode, or "_imagined" or "_explained".
    """
    return folder / f"{_file_name(task)}{suffix}.mp4"


def checkpoint_hash(checkpoint: Path, contract: str) -> str:
    """Return the SHA-256 of everything that determines how a checkpoint acts.

    Args:
        checkpoint: Folder, whose configs and weights are hashed with their names; or one file.
        contract: Contract of the policy as JSON; hashed with a file, which does not contain it.

    Returns:
        The digest in hexadecimal.
    """
    if checkpoint.is_file():
        files = [checkpoint]
        root = checkpoint.parent
        digest = hashlib.sha256(contract.encode())
    else:
        files = sorted([*checkpoint.rglob("*.json"), *checkpoint.rglob("*.safetensors")])
        root = checkpoint
        digest = hashlib.sha256(b"")

    # Large files are read in blocks.
    for path in files:
        digest.update(str(path.relative_to(root)).encode())
        with path.open("rb") as file:
            while block := file.read(HASH_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def open_results(folder: Path, settings: Mapping[str, Any]) -> list[Episode]:
    """Create the results folder, or open the one of an earlier evaluation with the same settings.

    Args:
        folder: Folder for the results.
        settings: Everything that results in one folder must have in common.

    Returns:
        The finished episodes of the earlier evaluation.

    Raises:
        ResultsError: The folder holds results of other settings.
    """
    with explained_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    run_path = folder / RUN
    run_text = json.dumps(settings, indent=2)
    if run_path.is_file() and documents.read_text(run_path, ResultsError, _CURE) != run_text:
        names = ", ".join(_different_settings(run_path, settings))
        raise ResultsError(
            f"{folder} holds results of other settings (different: {names}); "
            f"choose another folder or remove it"
        )
    write_text(run_path, run_text)

    # An evaluation that was killed can leave an incomplete last line: remove it.
    episodes_path = folder / EPISODES
    lines = []
    if episodes_path.is_file():
        lines = episodes_path.read_bytes().splitlines(keepends=True)
    complete = [line for line in lines if line.endswith(b"\n")]
    if len(complete) != len(lines):
        write_bytes(episodes_path, b"".join(complete))
    return read_episodes(folder)


def read_episodes(folder: Path) -> list[Episode]:
    """Return the finished episodes of an evaluation, in the order in which they ended.

    An incomplete last line is that of an episode which is being written: it is left out.

    Raises:
        ResultsError: The file is damaged, or holds an episode twice.
    """
    path = folder / EPISODES
    if not path.is_file():
        return []
    episodes = []
    seen = set()
    cure = "remove the line, and `wam eval` plays its episode again"
    for where, row in documents.read_json_lines(path, ResultsError, cure, only_complete=True):
        # Fields of a later version are left out.
        try:
            episode = from_plain(Episode, row, foreign=True)
        except ConfigError as error:
            raise ResultsError(f"{where} is no episode ({error}); {cure}") from error
        if (episode.task, episode.seed) in seen:
            raise ResultsError(
                f"{where}: task {episode.task!r} with seed {episode.seed} stands there twice; "
                f"remove one of the lines"
            )
        seen.add((episode.task, episode.seed))
        episodes.append(episode)
    return episodes


def _different_settings(path: Path, settings: Mapping[str, Any]) -> list[str]:
    """Return the names of the settings that differ from those in a file."""
    try:
        stored = documents.read_json_object(path, ResultsError, _CURE)
    except ResultsError:
        return list(settings)
    names = {**settings, **stored}
    return [name for name in names if stored.get(name) != settings.get(name)]


def append(folder: Path, row: Episode | Failure) -> None:
    """Append a finished episode or a failure to its file and sync it to disk."""
    name = EPISODES if isinstance(row, Episode) else FAILURES
    line = json.dumps(dataclasses.asdict(row)) + "\n"
    with (
        explained_write_errors(folder / name),
        (folder / name).open("a", encoding="utf-8") as file,
    ):
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_failures(folder: Path) -> list[dict[str, Any]]:
    """Return the failures of simulators in all runs of an evaluation, oldest first."""
    path = folder / FAILURES
    if not path.is_file():
        return []
    return [row for _, row in documents.read_json_lines(path, ResultsError, _CURE)]


def earlier_peak_memory(folder: Path, device: str) -> int | None:
    """Return the peak memory that an earlier evaluation on the same device stored in a folder.

    Args:
        folder: Results folder.
        device: Name of the device.

    Returns:
        Bytes; None if there is no such evaluation.
    """
    path = folder / SUMMARY
    if not path.is_file():
        return None
    summary = documents.read_json_object(path, ResultsError, _CURE)
    if summary.get("device") != device:
        return None
    peak: int | None = summary.get("peak_memory_bytes")
    return peak


def summarize(episodes: list[Episode], tasks: list[str]) -> dict[str, Any]:
    """Return the success rate of each task with its interval, their mean, and the latency.

    Args:
        episodes: Finished episodes.
        tasks: Names of the tasks.
    """
    summaries = {task: _summarize_task(episodes, task) for task in tasks}
    rates = [summary["success"] for summary in summaries.values()]
    latency = [ms for episode in episodes for ms in episode.latency_ms]
    return {
        "mean_success": float(np.mean(rates)),
        "tasks": summaries,
        "latency_ms": {
            "median": float(np.median(latency)),
            "p95": float(np.quantile(latency, 0.95)),
        },
    }


def _summarize_task(episodes: list[Episode], task: str) -> dict[str, Any]:
    """Return the entry of one task in `summary.json`."""
    steps = [episode.steps for episode in episodes if episode.task == task]
    success_steps = [
        episode.steps for episode in episodes if episode.task == task and episode.success
    ]
    return {
        "success": len(success_steps) / max(1, len(steps)),
        "episodes": len(steps),
        "interval": list(wilson_interval(len(success_steps), len(steps))),
        "mean_steps": _mean(steps),
        "mean_steps_of_successes": _mean(success_steps),
    }


def _mean(values: list[int]) -> float | None:
    """Return the mean; None if there are no values."""
    if not values:
        return None
    return float(np.mean(values))


def results_table(summary: dict[str, Any]) -> Table:
    """Return the content of `summary.json` as a table for the terminal."""
    latency = summary["latency_ms"]
    table = Table(
        caption=(
            f"latency of a chunk: median {latency['median']:.0f} ms, p95 {latency['p95']:.0f} ms"
        )
    )
    table.add_column("task", justify="left")
    for column in ("success", "95 % interval", "episodes", "steps to success"):
        table.add_column(column, justify="right")

    # One row per task.
    for task, row in summary["tasks"].items():
        low, high = row["interval"]
        steps = row["mean_steps_of_successes"]
        table.add_row(
            escape(task),
            f"{row['success']:.0%}",
            f"{low:.0%} … {high:.0%}",
            str(row["episodes"]),
            "-" if steps is None else f"{steps:.0f}",
        )
    table.add_row("mean", f"{summary['mean_success']:.1%}", "", "", "", style="bold")
    return table


def imagination_table(summary: dict[str, Any], stride: int) -> Table:
    """Return the PSNR of imagined futures as a table for the terminal.

    Args:
        summary: Content of `summary.json`, with "imagination".
        stride: Control steps from one frame to the next.
    """
    scores = summary["imagination"]
    frames = max(len(score["psnr_db"]) for score in scores.values())
    table = Table(caption="PSNR of imagined frames in dB; in brackets: of the observed frame")

    # One column per frame, one row per task.
    table.add_column("steps ahead")
    for k in range(1, frames + 1):
        table.add_column(str(k * stride), justify="right")

    for task, score in scores.items():
        pairs = zip(score["psnr_db"], score["still_psnr_db"], strict=True)
        cells = [f"{imagined:.1f} ({still:.1f})" for imagined, still in pairs]
        table.add_row(escape(task), *cells)
    return table
