"""Records demonstrations of an env's scripted expert, or of a policy, as a LeRobot v3.0 dataset.

The expert's command is the label. What the env executes is that command plus noise, or now and then
a perturbation: one random displacement for several steps. So the data shows how to recover, and the
position of the arm does not give away the position of the goal.
"""

# T steps of an episode, H W pixels, P numbers of state, A numbers per action

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from rich.progress import Progress

from wam_policy.contract import ActionLayout, EnvContract
from wam_policy.data.lerobot_reader import CAMERA_PREFIX
from wam_policy.data.lerobot_writer import LeRobotWriter
from wam_policy.errors import ConfigError, EnvError
from wam_policy.wrappers.envs.make import is_success, make_env
from wam_policy.wrappers.observation_map import rotate_180
from wam_policy.wrappers.paths import get_path

AnyEnv = gym.Env[Any, Any]
ScheduleItem = tuple[str | None, int, float]  # task, seed, noise

MAX_ATTEMPTS = 4  # seeds per demonstration before recording fails


@dataclass(frozen=True, kw_only=True)
class RecordConfig:
    """Demonstrations of scripted experts, or of a policy, written as a LeRobot v3.0 dataset."""

    output_dir: Path
    """Folder of the new dataset."""
    tasks: dict[str, int] = field(default_factory=dict)
    """Number of demonstrations for each value of the env's `task` argument: NAME NUMBER …"""
    episodes: int = 0
    """Number of demonstrations, for an env without that argument."""
    env: str = "wam_policy/MetaWorld-v0"
    """Gymnasium env id; the env needs a `contract` and, without `policy`, `expert_action()`."""
    env_kwargs: dict[str, str] = field(default_factory=dict)
    """Other arguments of the env, NAME VALUE …, for example `size 128`."""
    policy: str | None = None
    """Checkpoint that acts instead of the expert: folder, Hub id, or "embedded:<name>"."""
    action_noise: tuple[float, ...] = (0.0, 0.1, 0.3)
    """Standard deviations of the noise on the executed action; episodes take them in turn."""
    perturbation_rate: float = 0.0
    """Probability per step that a perturbation starts. Unless it is zero, half of the episodes
    start with one."""
    frames_after_success: int = 8
    """Frames recorded after the first success, for envs that can be stepped further."""
    seed: int = 1_000_000
    """First seed, to which each demonstration adds its number. Evaluation uses seeds below a
    million."""
    num_workers: int = 2
    """Processes, with one env each."""

    def __post_init__(self) -> None:
        counts = [count for _, count in self.demonstrations_per_task]
        if bool(self.tasks) == bool(self.episodes) or min(counts) < 1:
            raise ConfigError(
                "how many demonstrations? Pass either --tasks NAME NUMBER …, or --episodes NUMBER "
                "for an env without tasks; numbers must be positive"
            )
        if not self.action_noise or min(self.action_noise) < 0:
            raise ConfigError(
                "`action_noise` needs at least one value, none negative; use 0 for no noise"
            )

    @property
    def demonstrations_per_task(self) -> list[tuple[str | None, int]]:
        """Tasks and their numbers of demonstrations; the task is None if the env has none."""
        return [*self.tasks.items()] or [(None, self.episodes)]


@dataclass(frozen=True)
class Demonstration:
    """One recorded episode."""

    instruction: str
    images: dict[str, np.ndarray]  # camera -> uint8 [T, H, W, 3]
    state: np.ndarray  # float32 [T, P]
    action: np.ndarray  # float32 [T, A]


# The env of this worker process and what it was made from: a process has one renderer at a time.
_env: tuple[Any, AnyEnv] | None = None


def _worker_env(config: RecordConfig, task: str | None) -> AnyEnv:
    """Return this process's env, and make a new one if the task has changed."""
    global _env
    key = (config.env, task, config.env_kwargs)
    if _env is None or _env[0] != key:
        # Two envs would not fit beside each other, and a simulator's objects refer to each other.
        if _env is not None:
            _env[1].close()
            _env = None
            gc.collect()
        _env = (key, make_env(config.env, task, env_kwargs=config.env_kwargs))
    return _env[1]


@functools.lru_cache(maxsize=1)
def _worker_policy(checkpoint: str) -> Any:
    """Return this process's policy."""
    import torch

    from wam_policy.checkpoints import resolve_checkpoint
    from wam_policy.policy import WAMPolicy

    torch.set_num_threads(1)
    return WAMPolicy.from_pretrained(resolve_checkpoint(checkpoint))


class RandomPerturbations:
    """Random displacements that replace the expert's for several steps.

    The gripper and the rotation of a hand are left alone.

    Attributes:
        displacement_indices: Positions of the displacements in an action.
        rate: Probability per step that a perturbation starts.
        remaining_steps: Remaining steps of the current perturbation.
        displacement: Displacement of the current perturbation, in [-1, 1].
    """

    def __init__(self, rate: float, layout: ActionLayout, rng: np.random.Generator) -> None:
        """Start an episode.

        Args:
            rate: Probability per step that a perturbation starts.
            layout: What the actions mean.
            rng: Source of random numbers.
        """
        gripper = None if layout.gripper is None else layout.gripper.index
        self.displacement_indices = [
            index
            for index, name in enumerate(layout.names)
            if index != gripper and "rotation" not in name
        ]
        self.rate = rate
        self.rng = rng

        # Half of the episodes start with a perturbation, or the first steps would all look alike.
        self.remaining_steps = 0
        if rate and rng.random() < 0.5:
            self.remaining_steps = int(rng.integers(5, 25))
        self.displacement = self._direction()

    def _direction(self) -> np.ndarray:
        return self.rng.uniform(-1, 1, len(self.displacement_indices))

    def __call__(self, action: np.ndarray) -> np.ndarray:
        """Return the action to execute instead of `action`, both [A]."""
        # Between perturbations every step draws whether one starts.
        if not self.remaining_steps and self.rng.random() < self.rate:
            self.remaining_steps = int(self.rng.integers(4, 12))
            self.displacement = self._direction()
        if not self.remaining_steps:
            return action

        self.remaining_steps -= 1
        perturbed = action.copy()
        perturbed[self.displacement_indices] = self.displacement
        return perturbed


class PerturbedEnv(gym.Wrapper[Any, Any, Any, Any]):
    """Executes perturbed actions, and records observations and the unperturbed actions.

    Attributes:
        observations: Observation before each action.
        actions: Actions as they were commanded.
    """

    def __init__(self, env: AnyEnv, perturb: Callable[[np.ndarray], np.ndarray]) -> None:
        """Wrap an env.

        Args:
            env: Env to execute the actions in.
            perturb: Turns a commanded action [A] into the executed one.
        """
        super().__init__(env)
        self.perturb = perturb
        self.observations: list[Any] = []
        self.actions: list[np.ndarray] = []
        self._observation: Any = None

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        """Start an episode."""
        self._observation, info = self.env.reset(**options)
        return self._observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Record the action and execute its perturbation."""
        self.observations.append(self._observation)
        self.actions.append(action)
        executed = self.perturb(action)
        self._observation, reward, terminated, truncated, info = self.env.step(executed)
        return self._observation, reward, terminated, truncated, info


def demonstrate(
    config: RecordConfig, task: str | None, seed: int, noise: float
) -> Demonstration | None:
    """Run the expert, or a policy, for one episode.

    Args:
        config: Options of the recording.
        task: The env's `task` argument; None: it has none.
        seed: Seed of the env and of the noise.
        noise: Standard deviation of the noise on the executed action.

    Returns:
        The episode, or None if it ended without success.

    Raises:
        EnvError: The env's info does not report success.
    """
    bare = _worker_env(config, task)
    contract: EnvContract = bare.get_wrapper_attr("contract")
    action_space = bare.action_space
    assert isinstance(action_space, spaces.Box)  # the contract names its numbers

    # Perturbations and noise share one random stream, which differs from the env's.
    rng = np.random.default_rng([seed, 7])
    perturbations = RandomPerturbations(config.perturbation_rate, contract.action, rng)

    def perturb(action: np.ndarray) -> np.ndarray:
        commanded = perturbations(action)
        executed = commanded + noise * rng.standard_normal(action.shape)
        clipped = np.clip(executed, action_space.low, action_space.high)
        return clipped.astype(np.float32)

    # A policy acts through its own wrapper; the recording lies below it, in the env's terms.
    recorder = PerturbedEnv(bare, perturb)
    if config.policy is None:
        expert = bare.get_wrapper_attr("expert_action")
        succeeded = _run_episode(recorder, lambda _: expert(), seed, config)
    else:
        policy = _worker_policy(config.policy)
        env = policy.wrap(recorder)
        succeeded = _run_episode(env, lambda seen: policy.predict(seen)[0], seed, config)
    if not succeeded:
        return None
    return _demonstration(recorder, contract)


def _demonstration(recorder: PerturbedEnv, contract: EnvContract) -> Demonstration:
    """Return the episode that an env has recorded."""
    observations = recorder.observations
    images = {}
    for name, path in contract.cameras.items():
        frames = np.stack([get_path(one, path) for one in observations])
        if name in contract.rotated_cameras:
            frames = rotate_180(frames)
        images[name] = frames

    assert contract.state is not None
    states = [get_path(one, contract.state) for one in observations]
    return Demonstration(
        instruction=recorder.get_wrapper_attr("instruction"),
        images=images,
        state=np.stack(states).astype(np.float32),
        action=np.stack(recorder.actions).astype(np.float32),
    )


def _run_episode(env: AnyEnv, act: Callable[[Any], Any], seed: int, config: RecordConfig) -> bool:
    """Run one episode, up to some frames after the first success; return whether it succeeded."""
    observation, _ = env.reset(seed=seed)
    remaining: int | None = None  # steps to record; None before the first success
    while remaining is None or remaining > 0:
        observation, _, terminated, truncated, info = env.step(act(observation))
        if remaining is None and is_success(info):
            remaining = config.frames_after_success
        elif remaining is not None:
            remaining -= 1
        elif terminated or truncated:
            return False
        # An env that truncates an episode cannot be stepped further.
        if truncated:
            break
    return True


def _schedule(config: RecordConfig) -> list[ScheduleItem]:
    """Return task, seed and noise of every demonstration.

    Demonstrations of one task follow each other, so that a worker seldom makes a new env.
    """
    items: list[ScheduleItem] = []
    for task, count in config.demonstrations_per_task:
        for number in range(count):
            noise = config.action_noise[number % len(config.action_noise)]
            items.append((task, config.seed + number, noise))
    return items


def _demonstrate_until_success(config: RecordConfig, item: ScheduleItem) -> Demonstration:
    """Record one demonstration, with further seeds where an episode fails."""
    task, seed, noise = item
    for attempt in range(MAX_ATTEMPTS):
        # Far from the seeds of the other demonstrations.
        attempt_seed = seed + attempt * 100_000
        demonstration = demonstrate(config, task, attempt_seed, noise)
        if demonstration is not None:
            return demonstration
    actor = "expert" if config.policy is None else "policy"
    raise EnvError(
        f"{task or config.env}: the {actor} failed {MAX_ATTEMPTS} times from seed {seed} on; "
        f"lower the noise {noise}"
    )


def _exit_with_parent() -> None:
    """Let this worker process end when the process that started it does, even if that is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        """End this process once the parent has ended."""
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _demonstrations(config: RecordConfig) -> Iterator[Demonstration]:
    """Yield all demonstrations in the order of the schedule."""
    items = _schedule(config)
    # Forked processes would share the parent's renderer.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        config.num_workers, mp_context=context, initializer=_exit_with_parent
    ) as pool:
        configs = [config] * len(items)
        yield from pool.map(_demonstrate_until_success, configs, items, chunksize=4)


def record(config: RecordConfig) -> Path:
    """Record demonstrations and return the folder of the dataset.

    Args:
        config: Env, tasks, numbers of demonstrations, noise and target.

    Raises:
        EnvError: The env cannot be recorded, or an episode fails with every seed.
        DatasetError: The target folder exists, is in use or cannot be written, or an episode has a
            number that is not finite or frames of another size.
    """
    writer = _open_writer(config)
    with writer, Progress() as progress:
        total = sum(count for _, count in config.demonstrations_per_task)
        bar = progress.add_task("recording", total=total)
        for demonstration in _demonstrations(config):
            images = {CAMERA_PREFIX + name: frames for name, frames in demonstration.images.items()}
            vectors = {"observation.state": demonstration.state, "action": demonstration.action}
            writer.add_episode(demonstration.instruction, images, vectors)
            progress.advance(bar)
    return config.output_dir


def _open_writer(config: RecordConfig) -> LeRobotWriter:
    """Check that the env can be recorded, and start a dataset for its cameras and vectors."""
    first_task, _ = config.demonstrations_per_task[0]
    env = make_env(config.env, first_task, env_kwargs=config.env_kwargs)

    # The env must declare what every frame needs.
    required = ["contract", "instruction"]
    if config.policy is None:
        required.append("expert_action")
    for name in required:
        if not env.has_wrapper_attr(name):
            raise EnvError(
                f"{config.env} has no `{name}`: recording needs an env with a contract and a "
                f"scripted expert, or a --policy"
            )
    contract: EnvContract = env.get_wrapper_attr("contract")
    if contract.state is None:
        raise EnvError(f"{config.env}: set `state` in its contract; every recorded frame needs it")

    # A first observation tells how large the frames are.
    observation, _ = env.reset(seed=0)
    cameras = {}
    for name, path in contract.cameras.items():
        frame = np.asarray(get_path(observation, path))
        height, width = frame.shape[:2]
        cameras[CAMERA_PREFIX + name] = (height, width)
    if "render_fps" not in env.metadata:
        raise EnvError(
            f"{config.env}: set `render_fps` in its metadata; a recording needs its frame rate"
        )
    fps = int(env.metadata["render_fps"])
    env.close()

    return LeRobotWriter(
        config.output_dir,
        fps=fps,
        robot_type=config.env,
        cameras=cameras,
        vectors={"observation.state": contract.state_names, "action": contract.action.names},
        action=contract.action,
    )
