"""Records demonstrations of an env's scripted expert as a LeRobot v3.0 dataset.

The expert's command is the label; what is executed is the command plus noise, or now and then a shove: some steps of one
random displacement. So the data shows how to come back, and where the arm is does not give away where the goal is.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from rich.progress import Progress

from wam_policy.contract import ActionLayout
from wam_policy.errors import EnvError
from wam_policy.training.lerobot_writer import LeRobotWriter
from wam_policy.wrappers.make import make_env
from wam_policy.wrappers.paths import at

MAX_ATTEMPTS = 4  # seeds tried for one wanted demonstration before the expert is called unfit


@dataclass(frozen=True, kw_only=True)
class RecordConfig:
    """Demonstrations of scripted experts, written as a LeRobot v3.0 dataset."""

    out: Path
    """Folder of the new dataset."""
    tasks: dict[str, int]
    """Demonstrations wanted for each value of the env's `task` argument: name, number, name, number, …"""
    env: str = "wam_policy/MetaWorld-v0"
    """Gymnasium env id; the env must have `expert_action()` and a `contract`."""
    noise: tuple[float, ...] = (0.0, 0.1, 0.3)
    """Standard deviations of the noise on the executed action, used by turns."""
    shoves: float = 0.0
    """Chance per step that a shove begins; at an episode's start it is a half, if this isn't zero."""
    hold: int = 8
    """Frames recorded after the first success, for envs that can be stepped on."""
    seed: int = 1_000_000
    """First seed; a demonstration's seed is this plus its number. Evaluation uses seeds below a million."""
    workers: int = 2
    """Processes, one env each."""


@dataclass(frozen=True)
class Demonstration:
    """One recorded episode."""

    instruction: str
    images: dict[str, np.ndarray]  # camera -> uint8 [T, H, W, 3]
    state: np.ndarray  # float32 [T, P]
    action: np.ndarray  # float32 [T, A]


_env: tuple[Any, gym.Env[Any, Any]] | None = None  # the env of this worker process: one renderer a process


def _worker_env(env_id: str, task: str) -> gym.Env[Any, Any]:
    global _env
    if _env is None or _env[0] != (env_id, task):
        if _env is not None:
            _env[1].close()
        _env = ((env_id, task), make_env(env_id, task))
    return _env[1]


class Shoves:
    """Random displacements that replace the expert's for a few steps; the gripper stays the expert's."""

    def __init__(self, rate: float, layout: ActionLayout, rng: np.random.Generator) -> None:
        gripper = None if layout.gripper is None else layout.gripper.index
        self.moves = [i for i in range(layout.dim) if i != gripper]  # the numbers that are displacements
        self.rate, self.rng = rate, rng
        self.left = int(rng.integers(5, 25)) if rate and rng.random() < 0.5 else 0
        self.push = self._direction()

    def _direction(self) -> np.ndarray:
        return self.rng.uniform(-1, 1, len(self.moves))

    def __call__(self, action: np.ndarray) -> np.ndarray:
        """The action to execute instead of `action` [A]."""
        if not self.left and self.rng.random() < self.rate:
            self.left, self.push = int(self.rng.integers(4, 12)), self._direction()
        if not self.left:
            return action
        self.left -= 1
        shoved = action.copy()
        shoved[self.moves] = self.push
        return shoved


def demonstrate(env_id: str, task: str, seed: int, noise: float, hold: int, shove_rate: float = 0.0) -> Demonstration | None:
    """Run the expert for one episode; None if it fails."""
    env = _worker_env(env_id, task)
    rng = np.random.default_rng([seed, 7])
    contract, expert = env.get_wrapper_attr("contract"), env.get_wrapper_attr("expert_action")
    shoves = Shoves(shove_rate, contract.action, rng)
    low, high = env.action_space.low, env.action_space.high  # type: ignore[attr-defined]  # a Box: the contract names its numbers
    observation, _ = env.reset(seed=seed)
    images: dict[str, list[np.ndarray]] = {name: [] for name in contract.cameras}
    states, actions, left = [], [], None
    while left is None or left > 0:
        action = expert()
        for name, path in contract.cameras.items():
            images[name].append(at(observation, path))
        states.append(at(observation, contract.state))
        actions.append(action)
        executed = shoves(action) + noise * rng.standard_normal(action.shape)
        observation, _, _, truncated, info = env.step(np.clip(executed, low, high).astype(np.float32))
        if left is None and info["is_success"]:
            left = hold
        elif left is not None:
            left -= 1
        if truncated and left is None:
            return None
        if truncated:
            break
    return Demonstration(
        env.get_wrapper_attr("instruction"),
        {name: np.stack(frames) for name, frames in images.items()},
        np.stack(states).astype(np.float32),
        np.stack(actions).astype(np.float32),
    )


def _wanted(config: RecordConfig) -> list[tuple[str, int, float]]:
    """The (task, seed, noise) of every demonstration, task by task so that a worker seldom builds a new env."""
    return [
        (task, config.seed + number, config.noise[number % len(config.noise)])
        for task, count in config.tasks.items()
        for number in range(count)
    ]


def _attempt(config: RecordConfig, item: tuple[str, int, float]) -> Demonstration:
    task, seed, noise = item
    for attempt in range(MAX_ATTEMPTS):
        demonstration = demonstrate(config.env, task, seed + attempt * 100_000, noise, config.hold, config.shoves)
        if demonstration is not None:
            return demonstration
    raise EnvError(f"{task}: the expert failed {MAX_ATTEMPTS} times from seed {seed}; lower the noise {noise}")


def _demonstrations(config: RecordConfig) -> Iterator[Demonstration]:
    wanted = _wanted(config)
    with ProcessPoolExecutor(config.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_attempt, [config] * len(wanted), wanted, chunksize=4)


def record(config: RecordConfig) -> Path:
    """Record what the config asks for and return the dataset's folder."""
    probe = make_env(config.env, next(iter(config.tasks)))
    for name in ("expert_action", "contract", "instruction"):
        if not probe.has_wrapper_attr(name):
            raise EnvError(f"{config.env} has no `{name}`: only envs with a scripted expert and a contract can be recorded")
    contract, fps = probe.get_wrapper_attr("contract"), int(probe.metadata["render_fps"])
    observation, _ = probe.reset(seed=0)
    sizes = {name: np.asarray(at(observation, path)).shape[:2] for name, path in contract.cameras.items()}
    probe.close()
    writer = LeRobotWriter(
        config.out,
        fps=fps,
        robot_type=config.env,
        cameras={f"observation.images.{name}": size for name, size in sizes.items()},
        vectors={"observation.state": contract.state_names, "action": contract.action.names},
        action=contract.action,
    )
    with writer, Progress() as progress:
        bar = progress.add_task("recording", total=sum(config.tasks.values()))
        for demo in _demonstrations(config):
            writer.add_episode(
                demo.instruction,
                {f"observation.images.{name}": frames for name, frames in demo.images.items()},
                {"observation.state": demo.state, "action": demo.action},
            )
            progress.advance(bar)
    return config.out
