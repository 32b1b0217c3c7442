"""Asynchronous execution: the next chunk is computed while the current one plays, and continues what is played meanwhile.

An action is needed at every control step; a chunk takes a few. A chunk that is asked for now is there some steps later: its
first actions lie in the past. They are fixed to what is being played, and those after them are drawn towards the rest of the
old chunk, the less the later they come. Source: real-time chunking (Black et al., 2025) and its soft mask; known actions are
put in the place of the noisy ones at every step, not brought in by the gradient of the denoiser.
"""

# B batch, T actions in a chunk, A numbers per action

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, Literal

import numpy as np

from wam_policy.errors import ConfigError, ObservationError
from wam_policy.observation import EPISODE_START
from wam_policy.policy import WAMPolicy
from wam_policy.sampling import ActionTarget

Method = Literal["continue", "naive"]
REMEMBERED = 10  # delays that the next one is forecast from


def continuation_weights(horizon: int, overlap: int, delay: int) -> np.ndarray:
    """How much each action of a new chunk is held to the old chunk, float32 [horizon].

    1 for the `delay` actions that will have been played, then falling to 0 at the end of the `overlap` with the old chunk.
    """
    steps = np.arange(horizon)
    fall = np.clip((overlap - steps) / max(1, overlap - delay + 1), 0, 1)
    soft = fall * np.expm1(fall) / np.expm1(1)
    return np.where(steps < min(delay, overlap), 1.0, np.where(steps < overlap, soft, 0.0)).astype(
        np.float32
    )


class RealtimeRunner:
    """Gives an action at every control step and never makes the robot wait, but for its first chunk.

    Example:
        >>> from wam_policy import WAMPolicy
        >>> from wam_policy.checkpoints import embedded
        >>> policy = WAMPolicy.from_pretrained(embedded("metaworld-light-wam"))
        >>> runner = RealtimeRunner(policy, every=4)
        >>> runner.delay
        1
    """

    def __init__(
        self,
        policy: WAMPolicy,
        *,
        execution_horizon: int | None = None,
        delay: int = 1,
        method: Method = "continue",
        executor: Executor | None = None,
    ) -> None:
        """Begin with nothing to play.

        Args:
            policy: the policy, compiled or not.
            every: actions played of a chunk before the next one is asked for; the default is the contract's.
            delay: control steps that the first chunks are expected to take; later ones by what was measured.
            method: "continue" lets a chunk continue the one that plays; "naive" only skips what lies in the past.
            executor: where chunks are computed; the default is a thread of its own.

        Raises:
            ConfigError: a chunk would be used up before the next one can be there.
        """
        self.policy, self.method = policy, method
        self.horizon = policy.chunk_length()
        self.execution_horizon = (
            policy.config.action.replan if execution_horizon is None else execution_horizon
        )
        if (
            not self.execution_horizon >= 1
            or self.execution_horizon + delay > self.horizon
            or delay < 0
        ):
            raise ConfigError(
                f"after {self.execution_horizon} actions a chunk is asked for that takes {delay} steps: {self.horizon} actions don't last"
            )
        self._own = ThreadPoolExecutor(1, "wam-policy-realtime") if executor is None else None
        self._executor: Executor = executor or self._own  # type: ignore[assignment]  # one of them is there
        self._delays = deque([delay], maxlen=REMEMBERED)
        self.waits = 0  # steps at which the robot had to wait for a chunk that came too late
        self._pending: Future[np.ndarray] | None = None
        self.reset()

    @property
    def delay(self) -> int:
        """Control steps that the next chunk is expected to take: the longest of the last ones."""
        return max(self._delays)

    def reset(self) -> None:
        """Begin a new episode; a chunk that is being computed is dropped."""
        self._chunk: np.ndarray | None = None  # [B, T, A]
        self._step = 0  # of the chunk, the next to play
        self._asked = 0  # at which step the pending chunk was asked for
        if self._pending is not None:
            self._pending.cancel()
        self._pending = None

    def act(self, observation: Any) -> np.ndarray:
        """The action to play now, [A] or [B, A]; the observation is used if a chunk is asked for at this step.

        Raises:
            ObservationError: an episode begins in some of the envs and not in the others.
        """
        starts = (
            np.atleast_1d(observation.get(EPISODE_START, False))
            if isinstance(observation, Mapping)
            else np.zeros(1, bool)
        )
        if starts.all():
            self.reset()
        elif starts.any():
            raise ObservationError(
                "one runner plays episodes that begin together; give each env its own"
            )
        if self._chunk is None:
            self._chunk = self._executor.submit(_predict, self.policy, observation, None).result()
        elif self._pending is not None and (self._pending.done() or self._step >= self.horizon):
            self.waits += not self._pending.done()
            self._chunk, played = self._pending.result(), self._step - self._asked
            self._delays.append(played)
            self._pending, self._step = None, played
        if self._pending is None and self._step >= self.execution_horizon:
            self._asked, known = self._step, self._known()
            self._pending = self._executor.submit(_predict, self.policy, observation, known)
        action = self._chunk[..., self._step, :]
        self._step += 1
        return action

    def _known(self) -> ActionTarget | None:
        """What the next chunk continues."""
        assert self._chunk is not None
        overlap = self.horizon - self._step
        if self.method == "naive" or overlap <= 0:
            return None
        rest = np.zeros_like(self._chunk)
        rest[..., :overlap, :] = self._chunk[..., self._step :, :]
        return ActionTarget(rest, continuation_weights(self.horizon, overlap, self.delay))

    def close(self) -> None:
        """Stop the runner's own thread."""
        if self._own is not None:
            self._own.shutdown(wait=True, cancel_futures=True)


def _predict(policy: WAMPolicy, observation: Any, known: ActionTarget | None) -> np.ndarray:
    return policy.predict_chunk(observation, action_target=known)


class Late(Future[Any]):
    """A result that is there before it is said to be; who can't go on without it gets it."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def result(self, timeout: float | None = None) -> Any:
        """The result, said to be there or not."""
        return self.value


class DelayedExecutor(Executor):
    """Computes at once and says so only a number of control steps later: an injected latency, the same in every run."""

    def __init__(self, delay: int) -> None:
        self.delay = delay
        self._waiting: list[tuple[int, Late]] = []
        self._now = 0

    def submit(
        self, function: Callable[..., Any], /, *arguments: Any, **options: Any
    ) -> Future[Any]:
        """Compute; the future is done after `delay` ticks."""
        late = Late(function(*arguments, **options))
        self._waiting.append((self._now + self.delay, late))
        return late

    def tick(self) -> None:
        """A control step has passed."""
        self._now += 1
        for due, late in self._waiting:
            if due <= self._now:
                late.set_result(late.value)
        self._waiting = [(due, late) for due, late in self._waiting if due > self._now]
