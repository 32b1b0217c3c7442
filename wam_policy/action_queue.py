"""Plays chunks of actions, one queue per sub-env, says which sub-envs need a new chunk, and averages chunks that overlap."""

# N sub-envs, K chunks kept, T actions in a chunk, A numbers per action

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from wam_policy.errors import ConfigError


class ActionQueue:
    """Chunks of N sub-envs and how far each has been played."""

    def __init__(
        self,
        size: int,
        replan: int | Sequence[int],
        ensemble: float | None = None,
        horizon: int | None = None,
    ) -> None:
        """Begin with nothing to play.

        Args:
            size: number of sub-envs.
            replan: actions played of a chunk before a new one is needed; of several numbers the first counts for an episode's
                first chunk, the second for its second, …, the last for all that follow.
            ensemble: average the predictions that all chunks make for a step, as ACT does: the i-th oldest weighs
                exp(−ensemble·i), so 0 is the plain mean. None: the newest chunk is played as it is.
            horizon: actions of the chunks to ask for; None: as many as the policy was trained to give.

        Raises:
            ConfigError: a chunk of which nothing is played.
        """
        self.replan = np.atleast_1d(np.asarray(replan, int))
        if self.replan.ndim != 1 or not self.replan.size or (self.replan < 1).any():
            raise ConfigError(f"`replan` must be positive, got {replan}")
        self.size, self.ensemble, self.horizon = size, ensemble, horizon
        self._chunks: np.ndarray | None = None  # [N, K, T, A], the newest first
        self._step = np.zeros(
            (size, 0), int
        )  # [N, K], the step of each chunk that is next; T: it is over
        self._begun = np.zeros(size, int)  # chunks of each sub-env's episode

    def reset(self, mask: np.ndarray | None = None) -> None:
        """Drop what is left to play, of all sub-envs or of those where `mask` [N] is true."""
        chosen = ... if mask is None else np.asarray(mask, bool)
        self._begun[chosen] = 0
        if self._chunks is not None:
            self._step[chosen] = self._chunks.shape[2]

    def empty(self) -> np.ndarray:
        """Which sub-envs need a chunk before they can act, bool [N]."""
        if self._chunks is None:
            return np.ones(self.size, bool)
        limit = self.replan[np.clip(self._begun - 1, 0, len(self.replan) - 1)]
        return (self._begun == 0) | (self._step[:, 0] >= np.minimum(limit, self._chunks.shape[2]))

    def push(self, chunks: np.ndarray, mask: np.ndarray) -> None:
        """Give new chunks [sum(mask), T, A] to the sub-envs where `mask` [N] is true."""
        if (
            self._chunks is None or self._chunks.shape[2] != chunks.shape[1]
        ):  # another horizon: what was kept doesn't fit
            keep = 1 if self.ensemble is None else -(-chunks.shape[1] // int(self.replan.min()))
            self._chunks = np.zeros((self.size, keep, *chunks.shape[1:]), chunks.dtype)
            self._step = np.full((self.size, keep), chunks.shape[1])
        for kept, new in ((self._chunks, chunks), (self._step, 0)):
            kept[mask, 1:] = kept[mask, :-1]
            kept[mask, 0] = new
        self._begun[mask] += 1

    def pop(self) -> np.ndarray:
        """The next action of every sub-env, [N, A]; none may be empty."""
        if self._chunks is None or self.empty().any():
            raise RuntimeError(
                f"sub-envs {np.flatnonzero(self.empty()).tolist()} have no chunk to play; push one first"
            )
        horizon = self._chunks.shape[2]
        said = np.take_along_axis(
            self._chunks, np.minimum(self._step, horizon - 1)[:, :, None, None], axis=2
        )[:, :, 0]
        speaks = self._step < horizon  # [N, K], the newest always
        self._step = np.minimum(self._step + 1, horizon)
        if self.ensemble is None:
            return said[:, 0]
        rank = speaks.sum(1, keepdims=True) - np.cumsum(
            speaks, axis=1
        )  # 0 for the oldest that speaks
        weights = np.where(speaks, np.exp(-self.ensemble * rank), 0)
        return np.einsum("nk,nka->na", weights / weights.sum(1, keepdims=True), said).astype(
            said.dtype
        )
