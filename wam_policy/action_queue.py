"""Queue of action chunks for vectorised envs: open-loop execution, replanning and ensembling."""

# N sub-envs, K chunks kept per sub-env, T actions in a chunk, A components of an action

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from wam_policy.errors import ConfigError, ObservationError
from wam_policy.utils.locks import PicklableLock


class ActionQueue:
    """Chunks of N sub-envs and the position within each."""

    def __init__(
        self,
        size: int,
        replan: int | Sequence[int],
        ensemble: float | None = None,
        horizon: int | None = None,
    ) -> None:
        """Create an empty queue.

        Args:
            size: Number of sub-envs.
            replan: Actions executed from a chunk before the sub-env needs a new one. A sequence
                gives one number per chunk of an episode; its last number applies to all later
                chunks.
            ensemble: Decay of the temporal ensembling of ACT (https://arxiv.org/abs/2304.13705):
                the predictions of all chunks for a step are averaged, the i-th oldest with weight
                exp(−ensemble·i), so 0 is the plain mean. None: only the newest chunk is executed.
            horizon: Actions per chunk to request from the policy; None: the policy's default.

        Raises:
            ConfigError: A number in `replan` is not positive, or `ensemble` is not finite.
        """
        self.replan = np.atleast_1d(np.asarray(replan, int))
        if self.replan.ndim != 1 or not self.replan.size or (self.replan < 1).any():
            raise ConfigError(
                f"`replan` must be positive, one number or a sequence of them, got {replan}"
            )
        if ensemble is not None and not np.isfinite(ensemble):
            raise ConfigError(f"`ensemble` must be a finite number, got {ensemble}")
        if size < 1:
            raise ConfigError(f"a queue needs at least one env, got {size}")
        self.size = size
        self.ensemble = ensemble
        self.horizon = horizon

        self._chunks: np.ndarray | None = None  # [N, K, T, A], the newest first
        # [N, K], index of the next action within each chunk; T: the chunk is used up.
        self._step = np.zeros((size, 0), int)
        # [N], chunks pushed since the episode of each sub-env started.
        self._chunk_count = np.zeros(size, int)

    @property
    def _chunk_length(self) -> int:
        """T, the actions in a chunk; 0 before the first one."""
        return 0 if self._chunks is None else self._chunks.shape[2]

    def reset(self, mask: np.ndarray | None = None) -> None:
        """Discard the remaining actions.

        Args:
            mask: Sub-envs to reset, bool [N]; None: all.
        """
        selected = ... if mask is None else np.asarray(mask, bool)
        self._chunk_count[selected] = 0
        self._step[selected] = self._chunk_length

    def empty(self) -> np.ndarray:
        """Return which sub-envs need a new chunk before they can act, bool [N]."""
        if self._chunks is None:
            return np.ones(self.size, bool)

        # The limit belongs to the newest chunk; the last one of the schedule applies from there on.
        last = len(self.replan) - 1
        position = np.clip(self._chunk_count - 1, 0, last)
        limit = np.minimum(self.replan[position], self._chunk_length)

        has_none = self._chunk_count == 0
        newest_step = self._step[:, 0]
        return has_none | (newest_step >= limit)

    def push(self, chunks: np.ndarray, mask: np.ndarray) -> None:
        """Append new chunks.

        Args:
            chunks: Chunks [sum(mask), T, A], one per selected sub-env.
            mask: Sub-envs that receive a chunk, bool [N].
        """
        # A chunk of another length does not fit beside the previous ones: start afresh.
        if self._chunks is None or self._chunk_length != chunks.shape[1]:
            self._chunks, self._step = self._allocate(chunks)
        _insert(self._chunks, mask, chunks)
        _insert(self._step, mask, 0)
        self._chunk_count[mask] += 1

    def _allocate(self, chunks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return space [N, K, T, A] for chunks like these, and their steps [N, K]: all used up."""
        length = chunks.shape[1]
        capacity = 1
        if self.ensemble is not None:
            # Ceiling of T / replan: as many chunks can overlap at one step.
            shortest = int(self.replan.min())
            capacity = -(-length // shortest)
        step = np.full((self.size, capacity), length)
        return np.zeros((self.size, capacity, *chunks.shape[1:]), chunks.dtype), step

    def pop(self) -> np.ndarray:
        """Return the next action of every sub-env and advance by one step.

        Returns:
            Actions [N, A].

        Raises:
            RuntimeError: A sub-env is empty.
        """
        if self._chunks is None or self.empty().any():
            empty = np.flatnonzero(self.empty()).tolist()
            raise RuntimeError(f"sub-envs {empty} have no chunk to execute; push one first")

        # Predictions [N, K, A] of every chunk for this step; those of used-up chunks do not count.
        length = self._chunk_length
        index = np.minimum(self._step, length - 1)
        index = np.expand_dims(index, (2, 3))
        predictions = np.take_along_axis(self._chunks, index, axis=2).squeeze(axis=2)

        # Advance; `active` [N, K] are the chunks that reach this step, always with the newest.
        active = self._step < length
        self._step = np.minimum(self._step + 1, length)
        if self.ensemble is None:
            return predictions[:, 0]

        # Age rank among the active chunks: 0 is the oldest.
        rank = active.sum(1, keepdims=True) - np.cumsum(active, axis=1)
        decay = np.exp(-self.ensemble * rank)
        weights = np.where(active, decay, 0)
        weights = weights / weights.sum(1, keepdims=True)
        action = np.einsum("nk,nka->na", weights, predictions)
        return action.astype(predictions.dtype)


class OwnQueue:
    """The queue of the loop that names none; one thread uses it at a time.

    A pickled or copied one is empty: it belongs to a loop of its own.
    """

    def __init__(self) -> None:
        self._queue: ActionQueue | None = None
        self._thread: int | None = None
        self._lock = PicklableLock()

    def of_size(self, size: int, make: Callable[[int], ActionQueue]) -> ActionQueue:
        """Return the queue, made again if the number of envs has changed.

        Args:
            size: Number of envs.
            make: Makes a queue for so many envs.

        Raises:
            ObservationError: Another thread uses the queue.
        """
        # Two loops would execute each other's actions.
        with self._lock:
            thread = threading.get_ident()
            if self._thread not in (None, thread):
                raise ObservationError(
                    "another thread drives its envs by this policy's own queue: give each loop a "
                    "queue, `policy.predict(observation, state=policy.queue(size))`, or call "
                    "`policy.reset()` when the other loop has ended"
                )
            self._thread = thread
            if self._queue is None or self._queue.size != size:
                self._queue = make(size)
            return self._queue

    def reset(self, mask: np.ndarray | None) -> None:
        """Begin new episodes, of all envs or of those where `mask` [N] is true.

        After a reset of all, another thread may use the queue.
        """
        if self._queue is not None:
            self._queue.reset(mask)
        if mask is None:
            self._thread = None

    def __reduce__(self) -> tuple[type[OwnQueue], tuple[()]]:
        return OwnQueue, ()


def _insert(history: np.ndarray, mask: np.ndarray, newest: np.ndarray | int) -> None:
    """Insert the newest entries of some sub-envs in place; their oldest ones drop out.

    Args:
        history: Entries [N, K, …], the newest first.
        mask: Sub-envs that receive an entry, bool [N].
        newest: Entries [sum(mask), …], or one value for all.
    """
    history[mask, 1:] = history[mask, :-1]
    history[mask, 0] = newest
