"""Makes one env in its own process: the only code a simulator process imports, so it stays free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np

from wam_policy.errors import EnvError
from wam_policy.wrappers.chunk import ExecuteChunk


def make_env(env_id: str, task: str | None = None, chunk: int | None = None) -> gym.Env[Any, Any]:
    """Make an env.

    Args:
        env_id: Gymnasium id; "module:id" imports the module first.
        task: value of the env's `task` argument; None: it is made without.
        chunk: play chunks of so many actions per step; None: single actions.
    """
    arguments: dict[str, Any] = {} if task is None else {"task": task}
    env: gym.Env[Any, Any] = gym.make(env_id, disable_env_checker=True, **arguments)
    return env if chunk is None else ExecuteChunk(env, length=chunk)


def is_success(info: Mapping[str, Any]) -> np.ndarray:
    """What the info of a step says, bool, of one env or [B] of several.

    Raises:
        EnvError: it doesn't say.
    """
    for key in ("is_success", "success"):
        if key in info:
            return np.asarray(info[key], bool)
    raise EnvError(f"the env's info tells neither `is_success` nor `success`, only {sorted(info)}")
