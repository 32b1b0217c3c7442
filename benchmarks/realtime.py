"""Success and smoothness under latency: a robot that waits for each chunk, one that doesn't, one whose chunks continue.

    python benchmarks/realtime.py --delay 4

The latency is a number of control steps, the same in every run. "wait" holds still while a chunk is computed; "naive" plays the
old chunk meanwhile and then jumps to the new one; "continue" lets the new chunk continue the old one
(`wam_policy.realtime`). Meta-World, the embedded policies, seeds they weren't trained on.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from delayed_executor import DelayedExecutor

import wam_policy.wrappers  # noqa: F401  # registers the env ids
from wam_policy import WAMPolicy
from wam_policy.checkpoints import embedded
from wam_policy.evaluation.evaluate import METAWORLD_TASKS
from wam_policy.evaluation.results import wilson_interval
from wam_policy.realtime import RealtimeRunner

Method = Literal["wait", "naive", "continue"]
METHODS: tuple[Method, ...] = ("wait", "naive", "continue")


@dataclass(frozen=True, kw_only=True)
class RealtimeConfig:
    """The benchmark."""

    policies: tuple[str, ...] = ("metaworld-fast-wam", "metaworld-light-wam")
    tasks: tuple[str, ...] = METAWORLD_TASKS
    episodes: int = 10
    seed: int = 0
    delay: int = 4
    """Control steps that a chunk takes."""
    every: int = 4
    """Actions played of a chunk before the next one is asked for."""
    task: str | None = None
    """Used by the benchmark itself: one policy and task, in this process."""


def play(
    env: Any, policy: WAMPolicy, config: RealtimeConfig, method: Method, seed: int
) -> dict[str, Any]:
    """One episode: whether it succeeded, after how many steps, and its actions."""
    observation, _ = env.reset(seed=seed)
    executor = DelayedExecutor(config.delay)
    act = waiting(policy, config) if method == "wait" else None
    runner = RealtimeRunner(
        policy,
        execution_horizon=config.every,
        delay=config.delay,
        method="continue",
        executor=executor,
    )
    if method == "naive":
        runner.method = "naive"
    actions = []
    while True:
        action = act(observation) if act is not None else runner.act(observation)
        executor.tick()
        actions.append(action)
        observation, _, terminated, truncated, info = env.step(action)
        if terminated or truncated:
            return {
                "success": bool(info["is_success"]),
                "steps": len(actions),
                "actions": np.stack(actions),
            }


def waiting(policy: WAMPolicy, config: RealtimeConfig) -> Callable[[Any], np.ndarray]:
    """Acts like a robot that stands still while a chunk is computed: the fingers as they are, no movement."""
    queue: list[np.ndarray] = []
    still = np.zeros(policy.config.action.layout.dim, np.float32)
    gripper = policy.config.action.layout.gripper

    def act(observation: Any) -> np.ndarray:
        if not queue:
            queue.extend([still.copy() for _ in range(config.delay)])
            queue.extend(policy.predict_chunk(observation)[: config.every])
        action = queue.pop(0)
        if gripper is not None:
            still[gripper.index] = action[gripper.index]
        return action

    return act


def jerk(actions: np.ndarray) -> float:
    """Mean square of how much the commanded movement changes from step to step, the gripper left out."""
    moves = actions[:, :3]
    return float(np.square(np.diff(moves, axis=0)).sum(1).mean())


def measure(config: RealtimeConfig) -> dict[str, Any]:
    """One policy in one task, every method, the same episodes."""
    assert config.task is not None
    torch.set_num_threads(
        1
    )  # two of these run side by side, and threads that wait for each other would stop both
    policy = WAMPolicy.from_pretrained(embedded(config.policies[0]))
    env = policy.wrap(gym.make("wam_policy/MetaWorld-v0", task=config.task))
    found: dict[str, Any] = {}
    for method in METHODS:
        episodes = [
            play(env, policy, config, method, config.seed + i) for i in range(config.episodes)
        ]
        found[method] = {
            "successes": sum(e["success"] for e in episodes),
            "steps": [e["steps"] for e in episodes if e["success"]],
            "jerk": float(np.mean([jerk(e["actions"]) for e in episodes])),
        }
    return found


def run(config: RealtimeConfig, policy: str, task: str) -> dict[str, Any]:
    """One policy and task in a process of its own: a process draws with one GL context."""
    options = [
        f"--{name}={getattr(config, name)}" for name in ("episodes", "seed", "delay", "every")
    ]
    command = [sys.executable, __file__, *options, "--policies", policy, "--task", task]
    return json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[
            -1
        ]
    )


def main(config: RealtimeConfig) -> None:
    """Run the benchmark, or one policy and task of it."""
    if config.task is not None:
        print(json.dumps(measure(config)))
        return
    print(
        f"chunks take {config.delay} control steps, asked for after {config.every}; {config.episodes} episodes per task"
    )
    for policy in config.policies:
        with ThreadPoolExecutor(2) as pool:
            found = list(
                pool.map(lambda task, policy=policy: run(config, policy, task), config.tasks)
            )
        for method in METHODS:
            summary(policy, method, [task[method] for task in found], config.episodes)


def summary(policy: str, method: Method, tasks: Sequence[dict[str, Any]], episodes: int) -> None:
    """Print one policy's way."""
    wins, count = sum(task["successes"] for task in tasks), episodes * len(tasks)
    low, high = wilson_interval(wins, count)
    steps = [step for task in tasks for step in task["steps"]]
    print(
        f"{policy:20} {method:9} success {wins / count:.1%} ({low:.0%} … {high:.0%}), {np.mean(steps):.0f} steps to it, "
        f"change of movement {np.mean([task['jerk'] for task in tasks]):.4f}",
        flush=True,
    )


if __name__ == "__main__":
    main(tyro.cli(RealtimeConfig, description=__doc__))
