"""Measures a policy in a simulator: success with its uncertainty, episode length, latency; resumable to the episode."""

# K sub-envs

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from wam_policy.checkpoints import embedded
from wam_policy.errors import EnvError, WAMPolicyError
from wam_policy.hub.atomic import write_text
from wam_policy.hub.locate import Download, locate
from wam_policy.observation import IMAGE
from wam_policy.policy import WAMPolicy
from wam_policy.video_file import write_mp4
from wam_policy.wrappers.chunk import EXECUTED
from wam_policy.wrappers.make import make_env

logger = logging.getLogger(__name__)

METAWORLD_TASKS = ("reach-v3", "button-press-topdown-v3", "drawer-open-v3", "window-open-v3")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation of a checkpoint in a registered env."""

    checkpoint: str = "embedded:metaworld-fast-wam"
    """Folder, Hub id, or "embedded:<name>"."""
    env: str = "wam_policy/MetaWorld-v0"
    """Gymnasium env id."""
    tasks: tuple[str, ...] = METAWORLD_TASKS
    """Values of the env's `task` argument; none: the env is made without it."""
    episodes: int = 50
    """Episodes per task; episode i starts from seed + i."""
    envs: int = 2
    """Sub-envs, one process each, driven by one batched forward."""
    seed: int = 0
    """First seed. The embedded checkpoints were trained on seeds from 1,000,000."""
    out: Path = Path("runs/eval")
    """Folder of the results; started again, an evaluation goes on where it was."""
    video: bool = True
    """Write one mp4 per task."""
    device: str = "cpu"


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
    half = z / (1 + z * z / episodes) * np.sqrt(rate * (1 - rate) / episodes + z * z / (4 * episodes**2))
    return max(0.0, min(rate, float(centre - half))), min(1.0, max(rate, float(centre + half)))


def checkpoint_hash(folder: Path) -> str:
    """SHA-256 over the files that make a checkpoint act: configs and weights, by name."""
    digest = hashlib.sha256()
    for path in sorted([*folder.rglob("*.json"), *folder.rglob("*.safetensors")]):
        digest.update(str(path.relative_to(folder)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _vector(config: EvalConfig, task: str | None, size: int, length: int | None) -> AsyncVectorEnv:
    make = functools.partial(make_env, config.env, task, length)
    return AsyncVectorEnv([make] * size, context="spawn", autoreset_mode=AutoresetMode.DISABLED)


def _success(infos: dict[str, Any], size: int) -> np.ndarray:
    for key in ("is_success", "success"):
        if key in infos:
            return np.asarray(infos[key], bool)
    raise EnvError(f"the env reports neither `is_success` nor `success` in its info: {sorted(infos)} of {size} sub-envs")


def play(policy: WAMPolicy, config: EvalConfig, task: str | None, seeds: list[int]) -> Iterator[Episode]:
    """Play one episode per seed, `config.envs` at a time, and yield each as it ends."""
    size, length = min(config.envs, len(seeds)), policy.spec.action.replan
    with closing(_vector(config, task, size, length)) as plain:
        env: Any = policy.wrap(plain)
        waiting = list(seeds)
        current = [waiting.pop(0) for _ in range(size)]
        steps, rewards = np.zeros(size, int), np.zeros(size)
        latencies: list[list[float]] = [[] for _ in range(size)]
        idle = np.zeros(size, bool)  # sub-envs whose results no longer count
        observation, _ = env.reset(seed=list(current))
        while not idle.all():
            began = time.perf_counter()
            chunks = policy.predict_chunk(observation)
            milliseconds = round(1000 * (time.perf_counter() - began), 2)
            observation, reward, terminated, truncated, infos = env.step(chunks[:, :length])
            steps, rewards = steps + infos[EXECUTED], rewards + reward
            success, ended = _success(infos, size), terminated | truncated
            for i in range(size):
                latencies[i].append(milliseconds)
                if ended[i] and not idle[i]:
                    yield Episode(
                        task or config.env, current[i], bool(success[i]), int(steps[i]), float(rewards[i]), latencies[i]
                    )
                    idle[i] = not waiting
                    current[i] = waiting.pop(0) if waiting else current[i]
                if ended[i]:
                    steps[i], rewards[i], latencies[i] = 0, 0.0, []
            if ended.any() and not idle.all():
                observation, _ = env.reset(seed=list(current), options={"reset_mask": ended})


def film(policy: WAMPolicy, config: EvalConfig, task: str | None, path: Path) -> bool:
    """Play the first seed's episode once more, drawing every step, as an mp4 of the cameras side by side."""
    policy.reset()
    frames: list[np.ndarray] = []
    with closing(_vector(config, task, 1, None)) as plain:
        env: Any = policy.wrap(plain)
        observation, _ = env.reset(seed=[config.seed])
        while True:
            frames.append(np.concatenate([observation[IMAGE + name][0] for name in policy.spec.cameras.names], axis=1))
            actions, _ = policy.predict(observation)
            observation, _, terminated, truncated, infos = env.step(actions)
            if terminated[0] or truncated[0]:
                break
    write_mp4(path, frames, fps=20, enlarge=max(1, 256 // frames[0].shape[0]))
    return bool(_success(infos, 1)[0])


# -- results ---------------------------------------------------------------------------------------------------------


def _commit() -> str | None:
    result = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("wam-policy", "torch", "diffusers", "gymnasium", "numpy", "metaworld", "mujoco"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _begin(config: EvalConfig, digest: str) -> list[Episode]:
    """Make the results folder, or take up an earlier evaluation: its finished episodes.

    Raises:
        WAMPolicyError: the folder holds results of something else.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    settings = json.dumps({"checkpoint_sha256": digest, "env": config.env, "seed": config.seed}, indent=2)
    run = config.out / "run.json"
    if run.is_file() and run.read_text() != settings:
        raise WAMPolicyError(
            f"{config.out} holds results of another checkpoint, env or seed; choose another --out or remove it"
        )
    write_text(run, settings)
    path = config.out / "episodes.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) != len(lines):  # killed while a line was written
        write_text(path, "".join(whole))
    return [Episode(**json.loads(line)) for line in whole]


def _append(path: Path, episode: Episode) -> None:
    with path.open("a") as file:
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
            "mean_steps_of_successes": float(np.mean([e.steps for e in mine if e.success])) if wins else None,
        }
    latency = [ms for e in episodes for ms in e.latency_ms]
    return {
        "mean_success": float(np.mean([row["success"] for row in rows.values()])),
        "tasks": rows,
        "latency_ms": {"median": float(np.median(latency)), "p95": float(np.quantile(latency, 0.95))},
    }


def _table(summary: dict[str, Any]) -> Table:
    latency = summary["latency_ms"]
    table = Table(caption=f"latency of a chunk: median {latency['median']:.0f} ms, p95 {latency['p95']:.0f} ms")
    for column in ("task", "success", "95 % interval", "episodes", "steps to success"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task, row in summary["tasks"].items():
        low, high = row["interval"]
        steps = row["mean_steps_of_successes"]
        table.add_row(
            task,
            f"{row['success']:.0%}",
            f"{low:.0%} … {high:.0%}",
            str(row["episodes"]),
            "-" if steps is None else f"{steps:.0f}",
        )
    table.add_row("mean", f"{summary['mean_success']:.1%}", "", "", "", style="bold")
    return table


def evaluate(config: EvalConfig, console: Console | None = None) -> dict[str, Any]:
    """Evaluate, print a table, and return what `summary.json` holds."""
    console = console or Console()
    name = config.checkpoint.removeprefix("embedded:")
    folder = embedded(name) if name != config.checkpoint else locate(config.checkpoint, Download())
    policy = WAMPolicy.from_pretrained(folder, device=config.device)
    digest = checkpoint_hash(folder)
    tasks = [*config.tasks] or [config.env]
    episodes = _begin(config, digest)
    seeds = range(config.seed, config.seed + config.episodes)
    with Progress(console=console) as progress:
        for task in tasks:
            done = {e.seed for e in episodes if e.task == task}
            bar = progress.add_task(task, total=config.episodes, completed=len(done & set(seeds)))
            left = [seed for seed in seeds if seed not in done]
            if not left:
                continue
            for episode in play(policy, config, task if config.tasks else None, left):
                _append(config.out / "episodes.jsonl", episode)
                episodes.append(episode)
                wins = sum(e.success for e in episodes if e.task == task)
                progress.update(bar, advance=1, description=f"{task} {wins} succeeded")
        for task in tasks if config.video else []:
            path = config.out / f"{task.replace('/', '_')}.mp4"
            if not path.exists():
                film(policy, config, task if config.tasks else None, path)
    wanted = [e for e in episodes if e.seed in seeds]
    summary = summarize(wanted, tasks) | {
        "checkpoint": config.checkpoint,
        "checkpoint_sha256": digest,
        "env": config.env,
        "seeds": [seeds.start, seeds.stop - 1],
        "envs": config.envs,
        "device": str(policy.device),
        "dtype": str(policy.dtype).removeprefix("torch."),
        "versions": _versions(),
        "commit": _commit(),
    }
    write_text(config.out / "summary.json", json.dumps(summary, indent=2) + "\n")
    console.print(_table(summary))
    console.print(f"results, episodes and videos: {config.out}/")
    return summary
