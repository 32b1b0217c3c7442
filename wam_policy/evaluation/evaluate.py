"""Plays a policy in a simulator, many episodes, several at a time, and films it."""

# K sub-envs

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from rich.console import Console
from rich.progress import Progress

from wam_policy import sampling
from wam_policy.action_queue import ActionQueue
from wam_policy.checkpoints import resolve_checkpoint
from wam_policy.errors import ConfigError
from wam_policy.evaluation import explanation, imagination, results
from wam_policy.evaluation.results import Episode
from wam_policy.evaluation.rollout import rollout
from wam_policy.evaluation.video import write_mp4
from wam_policy.hub.download import DownloadOptions, resolve_folder
from wam_policy.models.fast_wam.variants import ActionMode
from wam_policy.models.light_wam import explain as light_wam_explain
from wam_policy.observation import IMAGE
from wam_policy.policy import WAMPolicy
from wam_policy.utils import environment
from wam_policy.utils.io import write_text
from wam_policy.wrappers.chunk import EXECUTED
from wam_policy.wrappers.envs.make import is_success, make_env

METAWORLD_TASKS = ("reach-v3", "button-press-topdown-v3", "drawer-open-v3", "window-open-v3")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation of a checkpoint in a registered env."""

    checkpoint: str = "embedded:metaworld-fast-wam"
    """Folder, file of a known release, Hub id, or "embedded:<name>"."""
    env: str = "wam_policy/MetaWorld-v0"
    """Gymnasium env id."""
    tasks: tuple[str, ...] = METAWORLD_TASKS
    """Values of the env's `task` argument; none: the env is made without it."""
    episodes: int = 50
    """Episodes per task; episode i starts from seed + i."""
    num_envs: int = 2
    """Sub-envs, one process each, driven by one batched forward."""
    seed: int = 0
    """First seed. The embedded checkpoints were trained on seeds from 1,000,000."""
    output_dir: Path = Path("runs/eval")
    """Folder of the results; started again, an evaluation goes on where it was."""
    video: bool = True
    """Write one mp4 per task."""
    imagine: bool = False
    """Compare imagined with real futures: PSNR, and one mp4 per task, what happened above what was imagined."""
    explain: bool = False
    """Film what a Light-WAM's action head looks at: one mp4 per task, the cameras above a heat map per tap."""
    replan: int | None = None
    """Actions played of each chunk; the default is the checkpoint's."""
    horizon: int | None = None
    """Actions per chunk; the default is the checkpoint's."""
    mode: ActionMode | None = None
    """What the actions see while they are denoised; the default is the checkpoint's."""
    ensemble: float | None = None
    """Average chunks that overlap, the i-th oldest weighing exp(-ensemble * i); the default is the checkpoint's."""
    device: str = "cpu"
    compile: bool = False
    """Compile the policy first (see `wam_policy.inference`)."""

    def __post_init__(self) -> None:
        if self.episodes < 1 or self.num_envs < 1:
            raise ConfigError(
                f"`episodes` and `envs` must be positive, got {self.episodes} and {self.num_envs}"
            )

    @property
    def overrides(self) -> dict[str, float | str]:
        """What departs from the checkpoint's own way of making and playing chunks."""
        given = {
            "replan": self.replan,
            "horizon": self.horizon,
            "ensemble": self.ensemble,
            "mode": self.mode,
        }
        given["compile"] = self.compile or None
        return {name: value for name, value in given.items() if value is not None}


def _vector(config: EvalConfig, task: str | None, size: int, length: int | None) -> AsyncVectorEnv:
    make = functools.partial(make_env, config.env, task, length)
    return AsyncVectorEnv([make] * size, context="spawn", autoreset_mode=AutoresetMode.DISABLED)


def _film_of(config: EvalConfig, task: str, kind: str = "") -> Path:
    return config.output_dir / f"{task.replace('/', '_')}{kind}.mp4"


def _queue(policy: WAMPolicy, config: EvalConfig, size: int) -> ActionQueue:
    return policy.queue(size, config.replan, config.ensemble, config.horizon)


def play_episodes(
    policy: WAMPolicy, config: EvalConfig, task: str | None, seeds: list[int]
) -> Iterator[Episode]:
    """Play one episode per seed, `config.envs` at a time, and yield each as it ends."""
    size = min(config.num_envs, len(seeds))
    queue = _queue(policy, config, size)
    length = int(queue.replan.max())
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
            chunks = policy.predict_chunk(observation, mode=config.mode, horizon=config.horizon)
            milliseconds = round(1000 * (time.perf_counter() - began), 2)
            queue.push(chunks, np.ones(size, bool))
            actions = np.stack([queue.pop() for _ in range(length)], axis=1)
            observation, reward, terminated, truncated, infos = env.step(actions)
            steps, rewards = steps + infos[EXECUTED], rewards + reward
            ended = terminated | truncated
            won = is_success(infos) if ended.any() else ended
            for i in range(size):
                latencies[i].append(milliseconds)
                if ended[i] and not idle[i]:
                    yield Episode(
                        task or config.env,
                        current[i],
                        bool(won[i]),
                        int(steps[i]),
                        float(rewards[i]),
                        latencies[i],
                    )
                    idle[i] = not waiting
                    current[i] = waiting.pop(0) if waiting else current[i]
                if ended[i]:
                    steps[i], rewards[i], latencies[i] = 0, 0.0, []
            queue.reset(ended)
            if ended.any() and not idle.all():
                observation, _ = env.reset(seed=list(current), options={"reset_mask": ended})


def record_video(policy: WAMPolicy, config: EvalConfig, task: str | None, path: Path) -> None:
    """Play the first seed's episode once more, drawing every step, as an mp4 of the cameras side by side."""

    def ask(observation: Any) -> np.ndarray:
        return policy.predict_chunk(observation, mode=config.mode, horizon=config.horizon)

    with closing(_vector(config, task, 1, None)) as plain:
        env: Any = policy.wrap(plain)
        frames = [
            np.concatenate(
                [observation[IMAGE + name][0] for name in policy.config.cameras.names], axis=1
            )
            for observation in rollout(env, config.seed, _queue(policy, config, 1), ask)
        ]
    _write(path, frames, fps=20)


def _write(path: Path, frames: list[np.ndarray], fps: int) -> None:
    write_mp4(path, frames, fps=max(1, fps), enlarge=max(1, 256 // frames[0].shape[0]))


def evaluate_imagination(
    policy: WAMPolicy, config: EvalConfig, task: str | None, path: Path
) -> dict[str, list[float]]:
    """Play the first seed's episode, film its real and imagined futures, and return how alike they are."""
    with closing(_vector(config, task, 1, None)) as plain:
        futures = imagination.rollout_futures(
            policy, policy.wrap(plain), config.seed, _queue(policy, config, 1), config.mode
        )
    _write(path, imagination.side_by_side(futures), fps=20 // policy.config.video.stride)
    return imagination.psnr_by_frame(futures)


def record_explanation(policy: WAMPolicy, config: EvalConfig, task: str | None, path: Path) -> None:
    """Play the first seed's episode and film what the action head looks at, a frame for each chunk."""
    frames: list[np.ndarray] = []

    def ask(observation: Any) -> np.ndarray:
        chunk, canvas, maps, weights = policy.explain(observation, horizon=config.horizon)
        frames.append(explanation.overlay(canvas[0], maps[0], weights))
        return chunk

    queue = _queue(policy, config, 1)
    with closing(_vector(config, task, 1, None)) as plain:
        for _ in rollout(policy.wrap(plain), config.seed, queue, ask):
            pass
    _write(path, frames, fps=20 // int(queue.replan.max()))


def _check(policy: WAMPolicy, config: EvalConfig) -> None:
    """Refuse, before anything is played, what the policy can't do."""
    _queue(policy, config, 1)
    policy.config.action_mode(config.mode)
    if config.imagine:
        sampling.check_can_imagine(policy.model)
    if config.explain:
        light_wam_explain.check_can_explain(policy.model)


def evaluate(config: EvalConfig, console: Console | None = None) -> dict[str, Any]:
    """Evaluate, print a table, and return what `summary.json` holds."""
    console = console or Console()
    named = resolve_checkpoint(config.checkpoint)
    folder = (
        named
        if isinstance(named, Path) and named.is_file()
        else resolve_folder(named, DownloadOptions())
    )
    policy = WAMPolicy.from_pretrained(folder, device=config.device)
    _check(policy, config)
    _ = policy.vae  # loading isn't latency
    if config.compile:
        policy = policy.compile(
            batch_sizes=(config.num_envs,), mode=config.mode, horizon=config.horizon
        )
    digest = results.checkpoint_hash(folder, policy.config.to_json())
    tasks = [*config.tasks] or [config.env]
    settings = {
        "checkpoint_sha256": digest,
        "env": config.env,
        "seed": config.seed,
        **config.overrides,
    }
    episodes = results.open_results(config.output_dir, settings)
    seeds = range(config.seed, config.seed + config.episodes)
    with Progress(console=console) as progress:
        for task in tasks:
            done = {e.seed for e in episodes if e.task == task}
            bar = progress.add_task(task, total=config.episodes, completed=len(done & set(seeds)))
            left = [seed for seed in seeds if seed not in done]
            if not left:
                continue
            for episode in play_episodes(policy, config, task if config.tasks else None, left):
                results.append_episode(config.output_dir, episode)
                episodes.append(episode)
                wins = sum(e.success for e in episodes if e.task == task)
                progress.update(bar, advance=1, description=f"{task} {wins} succeeded")
    wanted = [e for e in episodes if e.seed in seeds]
    summary = results.summarize(wanted, tasks) | {
        "checkpoint": config.checkpoint,
        "checkpoint_sha256": digest,
        "env": config.env,
        "seeds": [seeds.start, seeds.stop - 1],
        "envs": config.num_envs,
        "playing": config.overrides,
        "parameters": sum(p.numel() for p in policy.model.parameters()),
        "peak_memory_bytes": environment.peak_memory(policy.device, config.output_dir),
        "device": str(policy.device),
        "dtype": str(policy.dtype).removeprefix("torch."),
        "versions": environment.versions(),
        "commit": environment.commit(),
    }
    if config.imagine:
        summary["imagination"] = {
            task: evaluate_imagination(
                policy, config, task if config.tasks else None, _film_of(config, task, "_imagined")
            )
            for task in tasks
        }
    for task in tasks if config.explain else []:
        record_explanation(
            policy, config, task if config.tasks else None, _film_of(config, task, "_explained")
        )
    write_text(config.output_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    for task in tasks if config.video else []:
        path = _film_of(config, task)
        if not path.exists():
            record_video(policy, config, task if config.tasks else None, path)
    console.print(results.results_table(summary))
    if config.imagine:
        console.print(results.imagination_table(summary, policy.config.video.stride))
    console.print(f"results, episodes and videos: {config.output_dir}/")
    return summary
