"""Rollout of one episode in a wrapped vector env of one sub-env."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from wam_policy.action_queue import ActionQueue


def rollout(
    env: Any, seed: int, queue: ActionQueue, predict_fn: Callable[[Any], np.ndarray]
) -> Iterator[Any]:
    """Play one episode.

    Args:
        env: Wrapped vector env of one sub-env.
        seed: Seed of the episode.
        queue: Queue that executes the chunks; it is emptied first.
        predict_fn: Returns a chunk [1, T, A] for an observation.

    Yields:
        Every observation, the first and the last included.
    """
    queue.reset()
    observation, _ = env.reset(seed=[seed])
    ended = False

    # The caller sees an observation before the policy does.
    while not ended:
        yield observation
        empty = queue.empty()
        if empty[0]:
            queue.push(predict_fn(observation), empty)
        observation, _, terminated, truncated, _ = env.step(queue.pop())
        ended = bool(terminated[0] or truncated[0])

    yield observation
