"""A simulator process: it plays one episode after the other, chunk by chunk, and may be killed.

It imports no torch. Its env is made when the first episode of a task starts, in this process, so
that OpenGL belongs to it alone.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Self

import gymnasium as gym
import numpy as np

from wam_policy.contract import ActionLayout
from wam_policy.errors import WAMPolicyError
from wam_policy.wrappers.chunk import EXECUTED, ExecuteChunk
from wam_policy.wrappers.envs.make import is_success, make_env, with_step_limit
from wam_policy.wrappers.wrap import wrap

if TYPE_CHECKING:
    from wam_policy.config import PolicyConfig

Observation = dict[str, Any]

# Forked processes would share the parent's renderer and threads.
_PROCESSES = multiprocessing.get_context("spawn")
_CLOSE_SECONDS = 10.0  # after which a simulator that does not close its env is killed


@dataclass(frozen=True, kw_only=True)
class SimulatorOptions:
    """How a simulator makes its envs."""

    env: str  # Gymnasium env id
    env_kwargs: Mapping[str, str]
    perturb: Mapping[str, int]  # perturbation -> severity
    chunk_length: int  # actions executed in one step
    max_steps: int | None  # after which an episode is truncated; None: the env's limit
    cameras: tuple[str, ...]  # of the policy
    state_names: tuple[str, ...] | None  # of the policy; None: it reads no state
    layout: ActionLayout  # of the policy's actions

    @classmethod
    def of_policy(
        cls,
        policy: PolicyConfig,
        env: str,
        chunk_length: int,
        *,
        env_kwargs: Mapping[str, str] | None = None,
        perturb: Mapping[str, int] | None = None,
        max_steps: int | None = None,
    ) -> Self:
        """Return the options of envs that a policy is to control."""
        return cls(
            env=env,
            env_kwargs=env_kwargs or {},
            perturb=perturb or {},
            chunk_length=chunk_length,
            max_steps=max_steps,
            cameras=policy.cameras.names,
            state_names=None if policy.state is None else policy.state.names,
            layout=policy.action.layout,
        )


@dataclass(frozen=True)
class EpisodeStart:
    """Request for the first observation of an episode."""

    task: str | None  # value of the env's `task` argument; None: it has none
    seed: int


@dataclass(frozen=True)
class StepResult:
    """State of an episode after its start or after a chunk."""

    observation: Observation
    steps: int = 0  # actions executed
    reward: float = 0.0
    ended: bool = False
    success: bool = False


class SimulatorError(Exception):
    """A simulator that crashed, does not answer, or raised an error in an episode."""


class Simulator:
    """The caller's side of a simulator process, which does one thing at a time.

    Attributes:
        connection: Becomes readable when the simulator has answered or has died.
        deadline: Time, on the clock of `time.monotonic`, at which the simulator should have
            answered.
    """

    def __init__(self, options: SimulatorOptions, timeout: float) -> None:
        """Start the process.

        Args:
            options: How envs are made.
            timeout: Seconds that a simulator may take for an answer.
        """
        ours, theirs = _PROCESSES.Pipe()
        self.connection: Connection = ours
        self._process = _PROCESSES.Process(target=_simulate, args=(theirs, options), daemon=True)
        self._process.start()
        # Only the process holds the other end, so that its death closes the connection.
        theirs.close()
        self._timeout = timeout
        self.deadline = time.monotonic() + timeout

    def send(self, message: EpisodeStart | np.ndarray) -> None:
        """Start an episode, or execute a chunk [T, A] of it."""
        self.deadline = time.monotonic() + self._timeout
        # A process that has died is reported by `receive`.
        with contextlib.suppress(BrokenPipeError):
            self.connection.send(message)

    def receive(self) -> StepResult:
        """Return the answer to the last message.

        Raises:
            SimulatorError: The process has died, does not answer, or the episode failed.
            Exception: The env cannot be made, or an error of this package in an episode.
        """
        if not self.connection.poll() and time.monotonic() >= self.deadline:
            raise SimulatorError(f"did not answer within {self._timeout:.0f} s and was killed")
        try:
            answer = self.connection.recv()
        except (EOFError, ConnectionResetError) as error:
            self._process.join(_CLOSE_SECONDS)
            code = self._process.exitcode
            raise SimulatorError(f"its process ended with code {code}") from error
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, StepResult)
        return answer

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.join()
        self.connection.close()

    def release(self) -> None:
        """Let the process close its env and end; `close` waits for it."""
        with contextlib.suppress(BrokenPipeError):
            self.connection.send(None)

    def close(self) -> None:
        """Let the process close its env and wait until it has ended; kill it if it does not."""
        self.release()
        self._process.join(_CLOSE_SECONDS)
        self.kill()


def _simulate(connection: Connection, options: SimulatorOptions) -> None:
    """Answer messages until the caller closes or dies."""
    made: tuple[str | None, gym.Env[Any, Any]] | None = None
    while True:
        try:
            message = connection.recv()
        except EOFError:
            break
        if message is None:
            break

        # An env is kept for the next episodes of its task.
        if isinstance(message, EpisodeStart) and (made is None or made[0] != message.task):
            # Two envs would not fit beside each other: LIBERO's take 1.7 GiB. A simulator's objects
            # refer to each other, so that they stay until they are collected.
            if made is not None:
                made[1].close()
                made = None
                gc.collect()
            try:
                made = (message.task, _make_wrapped_env(options, message.task))
            except Exception as error:
                # The episodes after it would fail alike.
                connection.send(error)
                break
        assert made is not None
        connection.send(_answer(made[1], message))

    if made is not None:
        made[1].close()


def _make_wrapped_env(options: SimulatorOptions, task: str | None) -> gym.Env[Any, Any]:
    """Return an env whose steps are chunks of the policy's actions."""
    env = make_env(options.env, task, None, options.env_kwargs, options.perturb)
    env = with_step_limit(env, options.max_steps)
    env = ExecuteChunk(env, length=options.chunk_length)
    wrapped = wrap(
        env,
        cameras=options.cameras,
        state_names=options.state_names,
        layout=options.layout,
        overrides={},
    )
    assert isinstance(wrapped, gym.Env)
    return wrapped


def _answer(env: gym.Env[Any, Any], message: EpisodeStart | np.ndarray) -> Any:
    """Return the result of a message, or the error that ended the episode."""
    try:
        if isinstance(message, EpisodeStart):
            observation, _ = env.reset(seed=message.seed)
            return StepResult(observation)
        observation, reward, terminated, truncated, info = env.step(message)
        ended = bool(terminated or truncated)
        return StepResult(
            observation,
            steps=int(info[EXECUTED]),
            reward=float(reward),
            ended=ended,
            success=ended and bool(is_success(info)),
        )
    except WAMPolicyError as error:
        # A mistake in the options: the episode would fail again.
        return error
    except Exception as error:
        return SimulatorError(f"{type(error).__name__}: {error}")
