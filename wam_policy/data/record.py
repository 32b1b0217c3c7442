"""Records demonstrations of an env's scripted expert, or of a policy, as a LeRobot v3.0 dataset.

The expert's command is the label; what is executed is the command plus noise, or now and then a shove: some steps of one
random displacement. So the data shows how to come back, and where the arm is does not give away where the goal is.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from rich.progress import Progress

from wam_policy.contract import ActionLayout, EnvContract
from wam_policy.data.lerobot_writer import LeRobotWriter
from wam_policy.errors import ConfigError, EnvError
from wam_policy.wrappers.envs.make import is_success, make_env
from wam_policy.wrappers.observation import rotate_180
from wam_policy.wrappers.paths import get_path

MAX_ATTEMPTS = 4  # seeds tried for one wanted demonstration before the expert is called unfit


@dataclass(frozen=True, kw_only=True)
class RecordConfig:
    """Demonstrations of scripted experts, or of a policy, written as a LeRobot v3.0 dataset."""

    output_dir: Path
    """Folder of the new dataset."""
    tasks: dict[str, int] = field(default_factory=dict)
    """Demonstrations wanted for each value of the env's `task` argument: name, number, name, number, …"""
    episodes: int = 0
    """Demonstrations wanted of an env without that argument."""
    env: str = "wam_policy/MetaWorld-v0"
    """Gymnasium env id; the env must have a `contract` and, without `policy`, `expert_action()`."""
    policy: str | None = None
    """Checkpoint that acts in the expert's place: folder, Hub id, or "embedded:<name>"."""
    action_noise: tuple[float, ...] = (0.0, 0.1, 0.3)
    """Standard deviations of the noise on the executed action, used by turns."""
    perturbation_rate: float = 0.0
    """Chance per step that a shove begins; at an episode's start it is a half, if this isn't zero."""
    frames_after_success: int = 8
    """Frames recorded after the first success, for envs that can be stepped on."""
    seed: int = 1_000_000
    """First seed; a demonstration's seed is this plus its number. Evaluation uses seeds below a million."""
    num_workers: int = 2
    """Processes, one env each."""

    def __post_init__(self) -> None:
        if bool(self.tasks) == bool(self.episodes) or min(count for _, count in self.wanted) < 1:
            raise ConfigError(
                "how many demonstrations? Say --tasks NAME NUMBER …, or --episodes of an env without tasks"
            )

    @property
    def wanted(self) -> list[tuple[str | None, int]]:
        """How many demonstrations of which task; None: the env has none."""
        return [*self.tasks.items()] or [(None, self.episodes)]


@dataclass(frozen=True)
class Demonstration:
    """One recorded episode."""

    instruction: str
    images: dict[str, np.ndarray]  # camera -> uint8 [T, H, W, 3]
    state: np.ndarray  # float32 [T, P]
    action: np.ndarray  # float32 [T, A]


_env: tuple[Any, gym.Env[Any, Any]] | None = (
    None  # the env of this worker process: one renderer a process
)


def _worker_env(env_id: str, task: str | None) -> gym.Env[Any, Any]:
    global _env
    if _env is None or _env[0] != (env_id, task):
        if _env is not None:
            _env[1].close()
        _env = ((env_id, task), make_env(env_id, task))
    return _env[1]


class RandomPerturbations:
    """Random displacements that replace the expert's for a few steps; the gripper stays the expert's."""

    def __init__(self, rate: float, layout: ActionLayout, rng: np.random.Generator) -> None:
        gripper = None if layout.gripper is None else layout.gripper.index
        self.moves = [
            i for i in range(layout.dim) if i != gripper
        ]  # the numbers that are displacements
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


class PerturbedEnv(gym.Wrapper[Any, Any, Any, Any]):
    """Executes something else than it is told, and keeps what it saw and what it was told."""

    def __init__(self, env: gym.Env[Any, Any], disturb: Callable[[np.ndarray], np.ndarray]) -> None:
        super().__init__(env)
        self.disturb, self.now = disturb, None
        self.seen, self.told = list[Any](), list[np.ndarray]()

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        self.now, info = self.env.reset(**options)
        return self.now, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Keep the action, execute its disturbance."""
        self.seen.append(self.now)
        self.told.append(action)
        self.now, *rest = self.env.step(self.disturb(action))
        return self.now, *rest  # type: ignore[return-value]  # four values


def demonstrate(
    config: RecordConfig, task: str | None, seed: int, noise: float
) -> Demonstration | None:
    """Run the expert, or a policy, for one episode; None if it fails."""
    bare = _worker_env(config.env, task)
    rng = np.random.default_rng([seed, 7])
    contract = bare.get_wrapper_attr("contract")
    shoves = RandomPerturbations(config.perturbation_rate, contract.action, rng)
    low, high = bare.action_space.low, bare.action_space.high  # type: ignore[attr-defined]  # a Box: the contract names its numbers

    def disturb(action: np.ndarray) -> np.ndarray:
        executed = shoves(action) + noise * rng.standard_normal(action.shape)
        return np.clip(executed, low, high).astype(np.float32)

    env: gym.Env[Any, Any] = PerturbedEnv(bare, disturb)
    top, act = env, lambda _: bare.get_wrapper_attr("expert_action")()
    if config.policy is not None:
        policy = _worker_policy(config.policy)
        top, act = policy.wrap(env), lambda observation: policy.predict(observation)[0]
    observation, _ = top.reset(seed=seed)
    left = None
    while left is None or left > 0:
        observation, _, terminated, truncated, info = top.step(act(observation))
        if left is None and is_success(info):
            left = config.frames_after_success
        elif left is not None:
            left -= 1
        elif terminated or truncated:
            return None
        if truncated:
            break
    seen, told = env.seen, env.told  # type: ignore[attr-defined]  # of a `Disturbed`
    return Demonstration(
        bare.get_wrapper_attr("instruction"),
        {
            name: _pictures(contract, name, [get_path(one, path) for one in seen])
            for name, path in contract.cameras.items()
        },
        np.stack([get_path(one, contract.state) for one in seen]).astype(np.float32),
        np.stack(told).astype(np.float32),
    )


def _pictures(contract: EnvContract, camera: str, seen: list[np.ndarray]) -> np.ndarray:
    """One camera's pictures of an episode, the right way up."""
    pictures = np.stack(seen)
    return rotate_180(pictures) if camera in contract.rotated_cameras else pictures


@functools.lru_cache(maxsize=1)
def _worker_policy(checkpoint: str) -> Any:
    """The policy of this worker process."""
    import torch

    from wam_policy.checkpoints import resolve_checkpoint
    from wam_policy.policy import WAMPolicy

    torch.set_num_threads(1)
    return WAMPolicy.from_pretrained(resolve_checkpoint(checkpoint))


def _wanted(config: RecordConfig) -> list[tuple[str | None, int, float]]:
    """The (task, seed, noise) of every demonstration, task by task so that a worker seldom builds a new env."""
    return [
        (task, config.seed + number, config.action_noise[number % len(config.action_noise)])
        for task, count in config.wanted
        for number in range(count)
    ]


def _attempt(config: RecordConfig, item: tuple[str | None, int, float]) -> Demonstration:
    task, seed, noise = item
    for attempt in range(MAX_ATTEMPTS):
        demonstration = demonstrate(config, task, seed + attempt * 100_000, noise)
        if demonstration is not None:
            return demonstration
    who = "expert" if config.policy is None else "policy"
    raise EnvError(
        f"{task or config.env}: the {who} failed {MAX_ATTEMPTS} times from seed {seed}; lower the noise {noise}"
    )


def _demonstrations(config: RecordConfig) -> Iterator[Demonstration]:
    wanted = _wanted(config)
    with ProcessPoolExecutor(
        config.num_workers, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        yield from pool.map(_attempt, [config] * len(wanted), wanted, chunksize=4)


def record(config: RecordConfig) -> Path:
    """Record what the config asks for and return the dataset's folder."""
    probe = make_env(config.env, config.wanted[0][0])
    for name in ("contract", "instruction", *(() if config.policy else ("expert_action",))):
        if not probe.has_wrapper_attr(name):
            raise EnvError(
                f"{config.env} has no `{name}`: only envs with a contract and a scripted expert, or a --policy, can be recorded"
            )
    contract, fps = probe.get_wrapper_attr("contract"), int(probe.metadata["render_fps"])
    if contract.state is None:
        raise EnvError(
            f"{config.env}: its contract names no `state`, which every recorded frame needs"
        )
    observation, _ = probe.reset(seed=0)
    sizes = {
        name: np.asarray(get_path(observation, path)).shape[:2]
        for name, path in contract.cameras.items()
    }
    probe.close()
    writer = LeRobotWriter(
        config.output_dir,
        fps=fps,
        robot_type=config.env,
        cameras={f"observation.images.{name}": size for name, size in sizes.items()},
        vectors={"observation.state": contract.state_names, "action": contract.action.names},
        action=contract.action,
    )
    with writer, Progress() as progress:
        bar = progress.add_task("recording", total=sum(count for _, count in config.wanted))
        for demo in _demonstrations(config):
            writer.add_episode(
                demo.instruction,
                {f"observation.images.{name}": frames for name, frames in demo.images.items()},
                {"observation.state": demo.state, "action": demo.action},
            )
            progress.advance(bar)
    return config.output_dir
