"""Wrappers that convert a policy's actions to an env's action layout.

Components are matched by name, the gripper by its open and closed values; the result is clipped to
the bounds of the env's action space.
"""

# A components of an action, N sub-envs

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
    """Conversion of actions from one layout to another."""

    def __init__(
        self, source: ActionLayout, target: ActionLayout, space: spaces.Space[Any]
    ) -> None:
        """Create the conversion.

        Args:
            source: Layout of the policy's actions.
            target: Layout of the env's actions.
            space: Action space of the env, a Box [..., A].

        Raises:
            ActionError: The layouts command different quantities, one has a component or a
                gripper that the other lacks, or the space does not hold actions of the target.
        """
        if not isinstance(space, spaces.Box) or space.shape[-1:] != (target.dim,):
            raise ActionError(
                f"expected a Box action space of {target.dim} components {list(target.names)}, "
                f"the env has {space}; declare the layout that the env takes"
            )
        _check_layouts(source, target)

        self.source = source
        self.target = target
        self.low = space.low
        self.high = space.high

        # Index in the source of every component of the target.
        self.order = [source.names.index(name) for name in _names_without_gripper(target)]
        if source.gripper is not None and target.gripper is not None:
            self.order.insert(target.gripper.index, source.gripper.index)

    def __call__(self, action: np.ndarray) -> np.ndarray:
        """Convert actions [..., A] of the policy to actions of the env.

        Raises:
            ActionError: The actions have another length or contain a number that is not finite.
        """
        action = np.asarray(action)
        if action.shape[-1:] != (self.source.dim,):
            raise ActionError(
                f"expected actions [..., {self.source.dim}], got {list(action.shape)}; "
                f"pass the components {list(self.source.names)}"
            )
        if not np.isfinite(action).all():
            raise ActionError(
                "an action is not finite; check the policy's weights and its observations"
            )
        converted = action[..., self.order].astype(np.float64)
        self._convert_gripper(converted)
        clipped = np.clip(converted, self.low, self.high)
        return clipped.astype(self.low.dtype)

    def _convert_gripper(self, actions: np.ndarray) -> None:
        """Replace the source's gripper values by those of the target, in place."""
        source = self.source.gripper
        target = self.target.gripper
        if source is None or target is None:
            return

        # Opening of the gripper: 0 is closed, 1 is open.
        value = actions[..., target.index]
        opening = (value - source.closed) / (source.open - source.closed)
        if target.binary:
            opening = (opening > 0.5).astype(np.float64)
        elif source.binary:
            # A value exactly in the middle stays there, as with `sign` in Fast-WAM's evaluation.
            opening = (np.sign(opening - 0.5) + 1) / 2
        stroke = target.open - target.closed
        actions[..., target.index] = target.closed + opening * stroke

    def space(self, space: spaces.Box) -> spaces.Box:
        """Return the space of the policy's actions.

        Args:
            space: Action space of the env.

        Returns:
            The bounds of `space` in the order of the policy's components; those of the gripper
            are its open and closed values.
        """
        low = np.empty_like(space.low)
        high = np.empty_like(space.high)
        low[..., self.order] = space.low
        high[..., self.order] = space.high

        gripper = self.source.gripper
        if gripper is not None:
            low[..., gripper.index] = min(gripper.open, gripper.closed)
            high[..., gripper.index] = max(gripper.open, gripper.closed)
        return spaces.Box(low, high, dtype=np.float32)


def _check_layouts(source: ActionLayout, target: ActionLayout) -> None:
    """Check that actions of the layout `source` can be converted to the layout `target`."""
    if source.control != target.control:
        raise ActionError(
            f"the policy commands {source.control!r}, the env takes {target.control!r}: "
            f"put a controller between them"
        )
    if (source.gripper is None) != (target.gripper is None):
        side = "policy" if source.gripper is None else "env"
        raise ActionError(
            f"the {side} declares no gripper but the other side does; "
            f"declare its index and its open and closed values"
        )

    source_names = set(_names_without_gripper(source))
    target_names = set(_names_without_gripper(target))
    missing = sorted(target_names - source_names)
    extra = sorted(source_names - target_names)
    if missing or extra:
        raise ActionError(
            f"the action components do not match: only the env has {missing}, "
            f"only the policy has {extra}; use the same names on both sides"
        )


def _names_without_gripper(layout: ActionLayout) -> list[str]:
    """Return the names of all components except the gripper's."""
    names = list(layout.names)
    if layout.gripper is not None:
        del names[layout.gripper.index]
    return names


class WAMAction(gym.ActionWrapper[Any, np.ndarray, Any], gym.utils.RecordConstructorArgs):
    """Converts actions from the policy's layout to the env's layout.

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
        """Wrap an env.

        Args:
            env: Env to wrap.
            source: Layout of the policy's actions.
            target: Layout of the env's actions.

        Raises:
            ActionError: The layouts cannot be converted; see `ActionMap`.
        """
        gym.utils.RecordConstructorArgs.__init__(self, source=source, target=target)
        gym.ActionWrapper.__init__(self, env)
        self._map = ActionMap(source, target, env.action_space)
        assert isinstance(env.action_space, spaces.Box)
        self.action_space = self._map.space(env.action_space)

    @property
    def instruction(self) -> str:
        """Instruction of the current episode."""
        return str(self.env.get_wrapper_attr("instruction"))

    def action(self, action: np.ndarray) -> np.ndarray:
        """Convert an action [A] of the policy to an action of the env."""
        return self._map(action)


class VectorWAMAction(VectorActionWrapper):
    """Converts the actions of a vector env from the policy's layout to the env's layout.

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
        """Wrap a vector env.

        Args:
            env: Vector env to wrap.
            source: Layout of the policy's actions.
            target: Layout of the env's actions.

        Raises:
            ActionError: The layouts cannot be converted; see `ActionMap`.
        """
        super().__init__(env)
        self._map = ActionMap(source, target, env.single_action_space)
        assert isinstance(env.single_action_space, spaces.Box)
        self.single_action_space = self._map.space(env.single_action_space)
        self.action_space = batch_space(self.single_action_space, env.num_envs)

    @property
    def instruction(self) -> tuple[str, ...]:
        """Instructions of the current episodes, one per sub-env."""
        instructions: Any = getattr(self.env, "instruction")  # noqa: B009
        return tuple(instructions)

    def actions(self, actions: np.ndarray) -> np.ndarray:
        """Convert actions [N, A] of the policy to actions of the sub-envs."""
        return self._map(actions)
