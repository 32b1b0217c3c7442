"""Plays chunks of actions, one queue per sub-env, and says which sub-envs need a new chunk."""

# N sub-envs, T actions in a chunk, A numbers per action

from __future__ import annotations

import numpy as np


class ActionQueue:
    """Chunks of N sub-envs and how far each has been played."""

    def __init__(self, size: int, replan: int) -> None:
        """Begin with nothing to play.

        Args:
            size: number of sub-envs.
            replan: actions played of a chunk before a new one is needed.
        """
        self.size, self.replan = size, replan
        self._chunks: np.ndarray | None = None  # [N, T, A]
        self._played = np.full(size, replan)

    def reset(self, mask: np.ndarray | None = None) -> None:
        """Drop what is left to play, of all sub-envs or of those where `mask` [N] is true."""
        self._played[... if mask is None else np.asarray(mask, bool)] = self.replan

    def empty(self) -> np.ndarray:
        """Which sub-envs need a chunk before they can act, bool [N]."""
        return self._played >= self.replan

    def push(self, chunks: np.ndarray, mask: np.ndarray) -> None:
        """Give new chunks [sum(mask), T, A] to the sub-envs where `mask` [N] is true."""
        if self._chunks is None:
            self._chunks = np.zeros((self.size, *chunks.shape[1:]), chunks.dtype)
        self._chunks[mask] = chunks
        self._played[mask] = 0

    def pop(self) -> np.ndarray:
        """The next action of every sub-env, [N, A]; none may be empty."""
        if self._chunks is None or self.empty().any():
            raise RuntimeError(f"sub-envs {np.flatnonzero(self.empty()).tolist()} have no chunk to play; push one first")
        actions = self._chunks[np.arange(self.size), self._played]
        self._played += 1
        return actions
