"""Plays episodes: several simulator processes, driven by one batched policy.

A simulator that waits for a chunk does not wait for the others to finish theirs: whatever
observations have arrived are predicted in one batch. Batches are filled up to one fixed size, so
that an action does not depend on which episodes happen to share its batch.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any

import numpy as np

from wam_policy.action_queue import ActionQueue
from wam_policy.errors import EnvError
from wam_policy.evaluation.config import EvalConfig
from wam_policy.evaluation.results import Episode, Failure, LastFrame, Result
from wam_policy.evaluation.rollout import batched
from wam_policy.evaluation.simulator import (
    EpisodeStart,
    Observation,
    Simulator,
    SimulatorError,
    SimulatorOptions,
    StepResult,
)
from wam_policy.evaluation.video import camera_row
from wam_policy.observation import IMAGE
from wam_policy.policy import WAMPolicy

MAX_ATTEMPTS = 3  # of an episode whose simulator fails


@dataclass
class _Playing:
    """An episode that a simulator plays, and the simulator."""

    simulator: Simulator
    start: EpisodeStart
    queue: ActionQueue
    observation: Observation | None = None  # one that waits for a chunk
    steps: int = 0
    reward: float = 0.0
    latency_ms: list[float] = field(default_factory=list)

    def add(self, result: StepResult) -> None:
        """Add the result of a chunk, or of the start."""
        self.steps += result.steps
        self.reward += result.reward
        self.observation = None if result.ended else result.observation

    def finish(self, name: str, success: bool) -> Episode:
        """Return the result of the episode."""
        return Episode(
            task=name,
            seed=self.start.seed,
            success=success,
            steps=self.steps,
            reward=self.reward,
            latency_ms=self.latency_ms,
        )


def make_queue(policy: WAMPolicy, config: EvalConfig, size: int) -> ActionQueue:
    """Return the queue that executes chunks as the evaluation asks for."""
    return policy.queue(size, config.replan, config.ensemble, config.horizon)


def play_episodes(
    policy: WAMPolicy, config: EvalConfig, episodes: Sequence[EpisodeStart]
) -> Iterator[Result]:
    """Play episodes, `config.num_envs` at a time, each in a simulator process.

    A simulator that crashes, or does not answer within `config.timeout` seconds, is replaced by a
    new one, which plays the episode again.

    Args:
        policy: Policy to evaluate.
        config: Options of the evaluation.
        episodes: Episodes to play; those of one task should follow each other.

    Yields:
        Each episode when it ends, before it the last frame if it was no success, and each failure
        of a simulator.

    Raises:
        EnvError: Some episodes failed `MAX_ATTEMPTS` times; all others have been played.
    """
    length = int(make_queue(policy, config, 1).replan.max())
    options = SimulatorOptions.of_policy(
        policy.config,
        config.env,
        length,
        env_kwargs=config.env_kwargs,
        perturb=config.perturb,
        max_steps=config.max_steps,
    )
    player = _Player(policy, config, options, episodes)
    try:
        yield from player.play()
    finally:
        player.close()


class _Player:
    """The episodes that wait, and those that are being played."""

    def __init__(
        self,
        policy: WAMPolicy,
        config: EvalConfig,
        options: SimulatorOptions,
        episodes: Sequence[EpisodeStart],
    ) -> None:
        self._policy = policy
        self._config = config
        self._options = options
        self._waiting = deque(episodes)
        self._attempts: dict[EpisodeStart, int] = {}
        self._given_up: list[Failure] = []
        self._playing: list[_Playing] = []
        self._released: list[Simulator] = []
        # How long the first observation of a batch waits for others: one forward pass.
        self._patience = 0.0

    def play(self) -> Iterator[Result]:
        """Play all episodes."""
        size = min(self._config.num_envs, len(self._waiting))
        for _ in range(size):
            self._start(self._make_simulator())
        while self._playing:
            yield from self._receive()
            self._predict()
        if self._given_up:
            failed = ", ".join(f"{one.task} seed {one.seed}" for one in self._given_up)
            raise EnvError(
                f"{len(self._given_up)} episodes failed {MAX_ATTEMPTS} times ({failed}; the last: "
                f"{self._given_up[-1].reason}); all others are in {self._config.output_dir}, and "
                f"the same command plays these again"
            )

    def close(self) -> None:
        """End all simulators; at once those that still play."""
        for playing in self._playing:
            playing.simulator.kill()
        for simulator in self._released:
            simulator.close()

    def _make_simulator(self) -> Simulator:
        return Simulator(self._options, self._config.timeout)

    def _start(self, simulator: Simulator) -> None:
        """Let a simulator play the next episode; end it if there is none."""
        if not self._waiting:
            simulator.release()
            self._released.append(simulator)
            return
        start = self._waiting.popleft()
        simulator.send(start)
        queue = make_queue(self._policy, self._config, 1)
        self._playing.append(_Playing(simulator, start, queue))

    def _receive(self) -> Iterator[Result]:
        """Take the answers that arrive before a batch is due."""
        first_arrival: float | None = None
        while True:
            busy = [playing for playing in self._playing if playing.observation is None]
            if not busy:
                return
            if len(busy) < len(self._playing) and first_arrival is None:
                first_arrival = time.monotonic()

            # Without an observation that waits, only a deadline ends the wait.
            until = min(playing.simulator.deadline for playing in busy)
            if first_arrival is not None:
                until = min(until, first_arrival + self._patience)
            remaining = max(0.0, until - time.monotonic())
            ready = wait([playing.simulator.connection for playing in busy], remaining)
            late = [one for one in busy if one.simulator.deadline <= time.monotonic()]
            answered = [one for one in busy if one.simulator.connection in ready]
            for playing in {id(one): one for one in answered + late}.values():
                yield from self._handle(playing)
            if not ready and not late:
                return

    def _handle(self, playing: _Playing) -> Iterator[Result]:
        """Take the answer of one simulator; report the episode if it has ended."""
        name = playing.start.task or self._config.env
        try:
            result = playing.simulator.receive()
        except SimulatorError as error:
            yield self._replace(playing, name, str(error))
            return
        playing.add(result)
        if result.ended:
            self._playing.remove(playing)
            self._start(playing.simulator)
            if not result.success:
                pictures = [result.observation[IMAGE + camera] for camera in self._options.cameras]
                yield LastFrame(name, playing.start.seed, camera_row(pictures))
            yield playing.finish(name, result.success)

    def _replace(self, playing: _Playing, name: str, reason: str) -> Failure:
        """Replace a simulator that failed, and let its episode be played again."""
        start = playing.start
        attempt = self._attempts.get(start, 0) + 1
        self._attempts[start] = attempt
        failure = Failure(task=name, seed=start.seed, attempt=attempt, reason=reason)
        if attempt < MAX_ATTEMPTS:
            self._waiting.appendleft(start)
        else:
            self._given_up.append(failure)

        self._playing.remove(playing)
        playing.simulator.kill()
        if self._waiting:
            self._start(self._make_simulator())
        return failure

    def _predict(self) -> None:
        """Predict a chunk for every observation that waits, and send it."""
        batch = [playing for playing in self._playing if playing.observation is not None]
        if not batch:
            return
        start = time.perf_counter()
        # Filled up with copies of the last observation: every batch has the same size.
        observations: list[Any] = [playing.observation for playing in batch]
        missing = self._config.num_envs - len(batch)
        padded = batched(observations + [observations[-1]] * missing)
        seeds = self._noise_seeds(batch + [batch[-1]] * missing)
        chunks = self._policy.predict_chunk(
            padded, seeds=seeds, mode=self._config.mode, horizon=self._config.horizon
        )
        seconds = time.perf_counter() - start
        self._patience = seconds

        for playing, chunk in zip(batch, chunks, strict=False):
            playing.latency_ms.append(round(1000 * seconds, 2))
            playing.observation = None
            playing.queue.push(chunk[None], np.ones(1, bool))
            actions = [playing.queue.pop()[0] for _ in range(self._options.chunk_length)]
            playing.simulator.send(np.stack(actions))

    def _noise_seeds(self, batch: list[_Playing]) -> list[int] | None:
        """Return the seeds of the initial noise; None: the policy's own, which is always the same.

        A policy that draws new noise for every chunk draws it from the episode's seed and the
        number of the chunk, or an episode would depend on those beside it.
        """
        sampling = self._policy.config.sampling
        if sampling.noise != "fresh" or sampling.action_shift is None:
            return None
        sequences = [
            np.random.SeedSequence([playing.start.seed, len(playing.latency_ms)])
            for playing in batch
        ]
        return [int(sequence.generate_state(1)[0]) for sequence in sequences]
