"""Queue of action chunks for vectorised envs: open-loop execution, replanning and ensembling."""

# N sub-envs, K chunks kept per sub-env, T actions in a chunk, A components of an action

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from wam_policy.errors import ConfigError


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
            horizon: Actions per chunk to request from the policy; None: its trained horizon.

        Raises:
            ConfigError: A number in `replan` is not positive.
        """
        self.replan = np.atleast_1d(np.asarray(replan, int))
        if self.replan.ndim != 1 or not self.replan.size or (self.replan < 1).any():
            raise ConfigError(
                f"`replan` must be positive, one number or a sequence of them, got {replan}"
            )
        self.size = size
        self.ensemble = ensemble
        self.horizon = horizon

        self._chunks: np.ndarray | None = None  # [N, K, T, A], the newest first
        # [N, K], index of the next action within each chunk; T: the chunk is used up.
        self._step = np.zeros((size, 0), int)
        # [N], chunks pushed since the episode of each sub-env started.
        self._chunk_count = np.zeros(size, int)

    def reset(self, mask: np.ndarray | None = None) -> None:
        """Discard the remaining actions.

        Args:
            mask: Sub-envs to reset, bool [N]; None: all.
        """
        selected = ... if mask is None else np.asarray(mask, bool)
        self._chunk_count[selected] = 0
        if self._chunks is not None:
            horizon = self._chunks.shape[2]
            self._step[selected] = horizon

    def empty(self) -> np.ndarray:
        """Return which sub-envs need a new chunk before they can act, bool [N]."""
        if self._chunks is None:
            return np.ones(self.size, bool)

        # The limit belongs to the newest chunk; the last one of the schedule applies from there on.
        position = np.clip(self._chunk_count - 1, 0, len(self.replan) - 1)
        horizon = self._chunks.shape[2]
        limit = np.minimum(self.replan[position], horizon)
        return (self._chunk_count == 0) | (self._step[:, 0] >= limit)

    def push(self, chunks: np.ndarray, mask: np.ndarray) -> None:
        """Append new chunks.

        Args:
            chunks: Chunks [sum(mask), T, A], one per selected sub-env.
            mask: Sub-envs that receive a chunk, bool [N].
        """
        horizon = chunks.shape[1]

        # A chunk of another horizon does not fit beside the previous ones: start afresh.
        if self._chunks is None or self._chunks.shape[2] != horizon:
            capacity = 1
            if self.ensemble is not None:
                # Ceiling of T / replan: as many chunks can overlap at one step.
                capacity = -(-horizon // int(self.replan.min()))
            self._chunks = np.zeros((self.size, capacity, *chunks.shape[1:]), chunks.dtype)
            self._step = np.full((self.size, capacity), horizon)

        # Shift the older chunks by one place; the oldest drops out.
        self._chunks[mask, 1:] = self._chunks[mask, :-1]
        self._chunks[mask, 0] = chunks
        self._step[mask, 1:] = self._step[mask, :-1]
        self._step[mask, 0] = 0
        self._chunk_count[mask] += 1

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
        horizon = self._chunks.shape[2]
        index = np.minimum(self._step, horizon - 1)[:, :, None, None]
        predictions = np.take_along_axis(self._chunks, index, axis=2)[:, :, 0]
        active = self._step < horizon  # [N, K]; the newest chunk is always active
        self._step = np.minimum(self._step + 1, horizon)
        if self.ensemble is None:
            return predictions[:, 0]

        # Age rank among the active chunks: 0 is the oldest.
        rank = active.sum(1, keepdims=True) - np.cumsum(active, axis=1)
        weights = np.where(active, np.exp(-self.ensemble * rank), 0)
        normalized = weights / weights.sum(1, keepdims=True)
        action = np.einsum("nk,nka->na", normalized, predictions)
        return action.astype(predictions.dtype)
