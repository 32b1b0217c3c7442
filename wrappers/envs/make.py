"""Makes envs, also in simulator processes, and reads their success; imports no torch."""

from __future__ import annotations

import ast
import logging
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import TimeLimit

from wam_policy.errors import EnvError
from wam_policy.wrappers.chunk import ExecuteChunk
from wam_policy.wrappers.perturb import perturb_env

logger = logging.getLogger(__name__)

# Steps after which an episode of an env without a time limit is cut.
DEFAULT_MAX_STEPS = 1000

SUCCESS_KEYS = ("is_success", "success")  # info keys, in order of preference


def make_env(
    env_id: str,
    task: str | None = None,
    chunk: int | None = None,
    env_kwargs: Mapping[str, str] | None = None,
    perturb: Mapping[str, int] | None = None,
) -> gym.Env[Any, Any]:
    """Make an env.

    Args:
        env_id: Gymnasium id; "module:id" imports the module first.
        task: Value of the env's `task` argument; None: the env is made without it.
        chunk: Number of actions per step, executed by `ExecuteChunk`; None: single actions.
        env_kwargs: Other arguments of the env, as on the command line: a value is a Python literal
            ("64", "False", "(1, 2)") or, if it is none, text.
        perturb: Name of a perturbation -> severity from 1 to 5 (`perturb_env`); they act on single
            actions and observations, below `ExecuteChunk`.

    Returns:
        The env, without Gymnasium's passive checker.

    Raises:
        EnvError: The env does not take these arguments, or lacks what a perturbation needs.
        ConfigError: There is no such perturbation or severity.
    """
    arguments = {name: _literal(value) for name, value in (env_kwargs or {}).items()}
    if task is not None:
        arguments["task"] = task
    try:
        env: gym.Env[Any, Any] = gym.make(env_id, disable_env_checker=True, **arguments)
    except TypeError as error:
        # Errors of this package explain themselves.
        if isinstance(error, EnvError):
            raise
        raise EnvError(f"{env_id} cannot be made with {arguments}: {error}") from error
    env = perturb_env(env, perturb or {})
    if chunk is not None:
        env = ExecuteChunk(env, length=chunk)
    return env


def with_step_limit(env: gym.Env[Any, Any], max_steps: int | None) -> gym.Env[Any, Any]:
    """Return an env whose episodes end.

    Args:
        env: Env.
        max_steps: Steps after which an episode is truncated, whatever the env's own limit; None:
            that of the env, or `DEFAULT_MAX_STEPS` for an env that declares none, by Gymnasium's
            `max_episode_steps` or by an attribute `max_steps`.
    """
    if max_steps is not None:
        return TimeLimit(env, max_steps)
    has_limit = env.spec is not None and env.spec.max_episode_steps is not None
    if has_limit or env.has_wrapper_attr("max_steps"):
        return env
    logger.warning(
        "%s declares no time limit: episodes are cut after %d steps; "
        "--max-steps sets another limit",
        "the env" if env.spec is None else env.spec.id,
        DEFAULT_MAX_STEPS,
    )
    return TimeLimit(env, DEFAULT_MAX_STEPS)


def _literal(value: str) -> Any:
    """Return the Python literal that a text holds; the text itself if it holds none."""
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def is_success(info: Mapping[str, Any]) -> np.ndarray:
    """Return whether the task is solved, according to the info of a step.

    Args:
        info: Info of one env, or of a vector env.

    Returns:
        Success, a bool scalar or bool [N] for N sub-envs.

    Raises:
        EnvError: The info does not report success.
    """
    for key in SUCCESS_KEYS:
        if key in info:
            return np.asarray(info[key], bool)
    raise EnvError(
        f"the env's info must report success as `is_success` or `success`, it has {sorted(info)}"
    )
