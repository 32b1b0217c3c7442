"""Plays a whole chunk of actions as one step of the env."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space

from wam_policy.errors import ActionError

EXECUTED = "executed_steps"  # info key: how many actions of the chunk were played


def _chunk_space(space: spaces.Space[Any], length: int) -> spaces.Box:
    if not isinstance(space, spaces.Box):
        raise ActionError(f"chunks need a Box action space, the env has {space}")
    if length < 1:
        raise ActionError(f"a chunk needs at least one action, got {length}")
    low, high = (np.repeat(bound[None], length, axis=0) for bound in (space.low, space.high))
    return spaces.Box(low, high, dtype=space.dtype.type)


class ExecuteChunk(gym.Wrapper[Any, np.ndarray, Any, Any], gym.utils.RecordConstructorArgs):
    """One step plays `length` actions [length, A]; rewards are summed; an episode's end stops the chunk.

    `info["executed_steps"]` tells how many actions were played. Put `RecordEpisodeStatistics` inside to count env steps;
    outside it counts chunks; the return is the same. An env with a `draw_pixels` switch draws only where a chunk ends.

    Example:
        >>> import gymnasium as gym
        >>> import numpy as np
        >>> from wam_policy.wrappers import ExecuteChunk
        >>> env = ExecuteChunk(gym.make("Pendulum-v1"), length=4)
        >>> _ = env.reset(seed=0)
        >>> _, reward, _, _, info = env.step(np.zeros((4, 1), np.float32))
        >>> info["executed_steps"]
        4
    """

    def __init__(self, env: gym.Env[Any, Any], *, length: int) -> None:
        """Wrap an env; `length` is the number of actions in a chunk."""
        gym.utils.RecordConstructorArgs.__init__(self, length=length)
        gym.Wrapper.__init__(self, env)
        self.length = length
        self.action_space = _chunk_space(env.action_space, length)
        self._lazy = env.has_wrapper_attr("draw_pixels")

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Play the chunk until it, or the episode, ends."""
        chunk = np.asarray(action)
        if chunk.shape != self.action_space.shape:
            raise ActionError(
                f"expected a chunk {list(self.action_space.shape or ())}, got {list(chunk.shape)}"
            )
        total, executed = 0.0, 0
        terminated = truncated = False
        for i, single in enumerate(chunk):
            if self._lazy:
                self.env.set_wrapper_attr("draw_pixels", i == len(chunk) - 1)
            observation, reward, terminated, truncated, info = self.env.step(single)
            total, executed = total + float(reward), executed + 1
            if terminated or truncated:
                break
        if self._lazy:
            self.env.set_wrapper_attr("draw_pixels", True)
        return observation, total, terminated, truncated, {**info, EXECUTED: executed}


class VectorExecuteChunk(VectorWrapper):
    """The same for a vector env, whose sub-envs can only step together.

    The chunk stops for all as soon as one sub-env ends or is reset, so that no action reaches an episode it wasn't meant
    for; the others replan early. Where sub-envs can be wrapped one by one, `ExecuteChunk` inside wastes nothing.

    Example:
        >>> import gymnasium as gym
        >>> import numpy as np
        >>> from wam_policy.wrappers import VectorExecuteChunk
        >>> envs = gym.make_vec("Pendulum-v1", num_envs=2, vectorization_mode="sync")
        >>> envs = VectorExecuteChunk(envs, length=4)
        >>> _ = envs.reset(seed=0)
        >>> envs.step(np.zeros((2, 4, 1), np.float32))[-1]["executed_steps"]
        array([4, 4])
    """

    def __init__(self, env: VectorEnv, *, length: int) -> None:
        """Wrap a vector env; `length` is the number of actions in a chunk."""
        super().__init__(env)
        self.length = length
        self._mode = env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP)
        self._ended = np.zeros(env.num_envs, bool)
        self.single_action_space = _chunk_space(env.single_action_space, length)
        self.action_space = batch_space(self.single_action_space, env.num_envs)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset the sub-envs, or those of `options["reset_mask"]`."""
        mask = (options or {}).get("reset_mask")
        self._ended &= False if mask is None else ~np.asarray(mask)
        return self.env.reset(seed=seed, options=options)  # type: ignore[arg-type]  # gymnasium: one seed only

    def step(
        self, actions: np.ndarray
    ) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Play the chunks [N, length, A] until they, or an episode, end."""
        chunks = np.asarray(actions)
        if chunks.shape != self.action_space.shape:
            raise ActionError(
                f"expected chunks {list(self.action_space.shape or ())}, got {list(chunks.shape)}"
            )
        total, executed = np.zeros(self.num_envs), np.zeros(self.num_envs, np.int64)
        for single in chunks.swapaxes(0, 1):
            restarting = self._ended & (self._mode == AutoresetMode.NEXT_STEP)
            observations, rewards, terminations, truncations, infos = self.env.step(single)
            total, executed = total + rewards, executed + ~restarting
            self._ended = np.asarray(terminations) | np.asarray(truncations)
            if self._ended.any() or restarting.any():
                break
        return observations, total, terminations, truncations, {**infos, EXECUTED: executed}
