"""Plays one episode in a wrapped vector env of one, asking for a chunk whenever the last one is used up."""

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
        env: a wrapped vector env of one sub-env.
        seed: of the episode.
        queue: how chunks are played; emptied first.
        predict_fn: gives a chunk [1, T, A] for an observation.

    Yields:
        Every observation, the first and the last among them.
    """
    queue.reset()
    observation, _ = env.reset(seed=[seed])
    ended = False
    while not ended:
        yield observation
        empty = queue.empty()
        if empty[0]:
            queue.push(predict_fn(observation), empty)
        observation, _, terminated, truncated, _ = env.step(queue.pop())
        ended = bool(terminated[0] or truncated[0])
    yield observation
