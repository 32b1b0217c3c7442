"""Maps a policy's actions onto an env's: numbers by name, the gripper by open and closed, clipped to the space."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import VectorActionWrapper, VectorEnv
from gymnasium.vector.utils import batch_space

from wam_policy.contract import ActionLayout
from wam_policy.errors import ActionError


class ActionMap:
    """The mapping between two declared action layouts."""

    def __init__(
        self, source: ActionLayout, target: ActionLayout, space: spaces.Space[Any]
    ) -> None:
        """Settle the mapping.

        Args:
            source: what the policy's actions mean.
            target: what the env's actions mean.
            space: the env's action space, a Box [..., A].

        Raises:
            ActionError: the layouts command different things, one has a number or a gripper the other lacks, or the space
                doesn't hold actions of the target's length.
        """
        if not isinstance(space, spaces.Box) or not space.shape or space.shape[-1] != target.dim:
            raise ActionError(
                f"the env's action space {space} can't hold actions of {target.dim} numbers {target.names}"
            )
        if source.control != target.control:
            raise ActionError(
                f"the policy commands {source.control!r}, the env takes {target.control!r}: put a controller between them"
            )
        if (source.gripper is None) != (target.gripper is None):
            silent = "policy" if source.gripper is None else "env"
            raise ActionError(
                f"the {silent} declares no gripper but the other side does; "
                f"declare which number it is, and its open and closed values"
            )
        missing = sorted(set(self._rest(target)) - set(self._rest(source)))
        extra = sorted(set(self._rest(source)) - set(self._rest(target)))
        if missing or extra:
            raise ActionError(
                f"action numbers don't match: the env also wants {missing}, the policy also gives {extra}"
            )
        self.source, self.target = source, target
        self.low, self.high = space.low, space.high
        self.order = [
            source.gripper.index
            if source.gripper is not None
            and target.gripper is not None
            and i == target.gripper.index
            else source.names.index(name)
            for i, name in enumerate(target.names)
        ]

    @staticmethod
    def _rest(layout: ActionLayout) -> list[str]:
        """The names of all numbers but the gripper's."""
        return [
            name
            for i, name in enumerate(layout.names)
            if layout.gripper is None or i != layout.gripper.index
        ]

    def __call__(self, action: np.ndarray) -> np.ndarray:
        """Map actions [..., A] of the policy onto actions of the env.

        Raises:
            ActionError: another length, or a number that isn't finite.
        """
        action = np.asarray(action)
        if not action.shape or action.shape[-1] != self.source.dim or not np.isfinite(action).all():
            raise ActionError(
                f"expected finite actions [..., {self.source.dim}], got {action.dtype} {list(action.shape)}"
            )
        mapped = action[..., self.order].astype(np.float64)
        ours, theirs = self.source.gripper, self.target.gripper
        if ours is not None and theirs is not None:
            opening = (mapped[..., theirs.index] - ours.closed) / (ours.open - ours.closed)
            if theirs.binary:
                opening = (opening > 0.5).astype(np.float64)
            elif ours.binary:
                opening = (
                    np.sign(opening - 0.5) + 1
                ) / 2  # exactly between the two it stays there, as in the reference
            mapped[..., theirs.index] = theirs.closed + opening * (theirs.open - theirs.closed)
        return np.clip(mapped, self.low, self.high).astype(self.low.dtype)

    def space(self, space: spaces.Box) -> spaces.Box:
        """The space of the policy's actions: the env's bounds, reordered; the gripper's are its own two values."""
        low, high = np.empty_like(space.low), np.empty_like(space.high)
        low[..., self.order], high[..., self.order] = space.low, space.high
        gripper = self.source.gripper
        if gripper is not None:
            low[..., gripper.index] = min(gripper.open, gripper.closed)
            high[..., gripper.index] = max(gripper.open, gripper.closed)
        return spaces.Box(low, high, dtype=np.float32)


class WAMAction(gym.ActionWrapper[Any, np.ndarray, Any], gym.utils.RecordConstructorArgs):
    """Takes actions that mean what the policy declares and gives the env what it declares.

    Example:
        >>> import gymnasium as gym
        >>> from wam_policy.contract import ActionLayout, Gripper
        >>> from wam_policy.wrappers import WAMAction
        >>> env = gym.make("Pendulum-v1")
        >>> layout = ActionLayout(names=("torque",), control="joint_torque", gripper=None)
        >>> env = WAMAction(env, source=layout, target=layout)
        >>> env.action([5.0])
        array([2.], dtype=float32)
    """

    def __init__(
        self, env: gym.Env[Any, Any], *, source: ActionLayout, target: ActionLayout
    ) -> None:
        """Wrap an env; `source` is the policy's layout, `target` the env's. Raises `ActionError` as `ActionMap` does."""
        gym.utils.RecordConstructorArgs.__init__(self, source=source, target=target)
        gym.ActionWrapper.__init__(self, env)
        self._map = ActionMap(source, target, env.action_space)
        assert isinstance(env.action_space, spaces.Box)
        self.action_space = self._map.space(env.action_space)

    def action(self, action: np.ndarray) -> np.ndarray:
        """The env's action."""
        return self._map(action)


class VectorWAMAction(VectorActionWrapper):
    """The same for a vector env.

    Example:
        >>> import gymnasium as gym
        >>> from wam_policy.contract import ActionLayout
        >>> from wam_policy.wrappers import VectorWAMAction
        >>> envs = gym.make_vec("Pendulum-v1", num_envs=2, vectorization_mode="sync")
        >>> layout = ActionLayout(names=("torque",), control="joint_torque", gripper=None)
        >>> VectorWAMAction(envs, source=layout, target=layout).actions([[5.0], [-1.0]])
        array([[ 2.],
               [-1.]], dtype=float32)
    """

    def __init__(self, env: VectorEnv, *, source: ActionLayout, target: ActionLayout) -> None:
        """Wrap a vector env; arguments and errors are those of `WAMAction`."""
        super().__init__(env)
        self._map = ActionMap(source, target, env.single_action_space)
        assert isinstance(env.single_action_space, spaces.Box)
        self.single_action_space = self._map.space(env.single_action_space)
        self.action_space = batch_space(self.single_action_space, env.num_envs)

    def actions(self, actions: np.ndarray) -> np.ndarray:
        """The sub-envs' actions."""
        return self._map(actions)
