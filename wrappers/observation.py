"""Wrappers that convert an env's observation to the flat dict that a policy reads.

The entries are described in `wam_policy.observation`.
"""

# N sub-envs, H W pixels, P components of the state

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space

from wam_policy.errors import EnvError
from wam_policy.observation import EPISODE_START, INSTRUCTION
from wam_policy.utils.deprecation import renamed
from wam_policy.wrappers.autoreset import EpisodeTracker
from wam_policy.wrappers.observation_map import Converted, ObservationMap, checked_instruction

Info = dict[str, Any]
Step = tuple[Converted, Any, bool, bool, Info]
VectorStep = tuple[Converted, np.ndarray, np.ndarray, np.ndarray, Info]


def sub_env_attributes(env: VectorEnv, name: str) -> tuple[Any, ...] | None:
    """Return an attribute of every sub-env.

    Args:
        env: Vector env.
        name: Name of the attribute.

    Returns:
        One value per sub-env; None if one of them lacks the attribute, or if the vector env gives
        no access to its sub-envs.
    """
    inner: Any = env.unwrapped
    if not hasattr(inner, "call"):
        return None
    # Asking an AsyncVectorEnv for a missing attribute kills its workers: check for it first.
    present = inner.call("has_wrapper_attr", name)
    if not all(present):
        return None
    return tuple(inner.get_attr(name))


class WAMObservation(gym.Wrapper[dict[str, Any], Any, Any, Any], gym.utils.RecordConstructorArgs):
    """Converts observations to the flat dict that a policy reads.

    The entries are `images.<camera>` uint8 [H, W, 3], `state` float32 [P] (if there is one),
    `instruction` str, and `episode_start`, which is 1 for the first observation of an episode.

    Example:
        >>> import gymnasium as gym
        >>> from wam_policy.wrappers import WAMObservation
        >>> env = gym.make("CartPole-v1", render_mode="rgb_array")
        >>> env = WAMObservation(
        ...     env, cameras={"front": "render()"}, state="", instruction="balance the pole"
        ... )
        >>> observation, info = env.reset(seed=0)
        >>> sorted(observation)
        ['episode_start', 'images.front', 'instruction', 'state']
        >>> observation["images.front"].shape
        (400, 600, 3)
    """

    def __init__(
        self,
        env: gym.Env[Any, Any],
        *,
        cameras: Mapping[str, str],
        rotated_cameras: tuple[str, ...] = (),
        state: str | None = None,
        state_indices: tuple[int, ...] | None = None,
        instruction: str | None = None,
        text: bool = True,
        render_size: tuple[int, int] | None = None,
        turned: tuple[str, ...] | None = None,
        pick: tuple[int, ...] | None = None,
    ) -> None:
        """Wrap an env.

        Args:
            env: Env to wrap.
            cameras: Camera -> path of its images in the observation, or "render()".
            rotated_cameras: Cameras whose images are upside down and are rotated by 180 degrees.
            state: Path of the state vector; None: no state.
            state_indices: Selected components of that vector, in this order; None: all.
            instruction: Language instruction; None: the attribute `instruction` of the env, read
                at every reset.
            text: Whether observations hold the instruction; without it their keys have no dots, and
                the attribute `instruction` holds it.
            render_size: Height and width of the images of `env.render()`; None: those of the first
                one, after a reset. The observation space is not known before.
            turned: Deprecated name of `rotated_cameras`.
            pick: Deprecated name of `state_indices`.

        Raises:
            EnvError: A path leads nowhere, or to something other than images or a vector, or
                there is no instruction.
        """
        rotated = renamed("turned", turned, "rotated_cameras", rotated_cameras or None)
        rotated = rotated or ()
        indices = renamed("pick", pick, "state_indices", state_indices)
        gym.utils.RecordConstructorArgs.__init__(
            self,
            cameras=dict(cameras),
            rotated_cameras=rotated,
            state=state,
            state_indices=indices,
            instruction=instruction,
            text=text,
            render_size=render_size,
        )
        gym.Wrapper.__init__(self, env)
        self._map = ObservationMap(dict(cameras), rotated, state, indices, text)
        self._render_size = render_size
        self._fixed_instruction = instruction
        self._instruction = self._read_instruction()
        self._space: spaces.Dict | None = None

        # Wrong paths are reported now. The size of rendered images is only known after a reset.
        self._map.check_render_mode(env)
        if not self._map.uses_render or render_size is not None:
            self._space = self._map.space(env.observation_space, render_size)

    @property  # type: ignore[misc]
    def observation_space(self) -> spaces.Dict:  # type: ignore[override]
        """Space of the converted observations.

        Raises:
            EnvError: A camera is rendered, its size was not given, and the env was not reset yet.
        """
        if self._space is None:
            self._space = self._map.space(self.env.observation_space, self._render_size)
        return self._space

    @property
    def instruction(self) -> str:
        """Instruction of the current episode."""
        return self._instruction

    def _read_instruction(self) -> str:
        """Return the given instruction, else the current one of the env."""
        if self._fixed_instruction is not None:
            return checked_instruction(self._fixed_instruction)
        if not self.env.has_wrapper_attr("instruction"):
            raise EnvError(
                "the env has no attribute `instruction`; "
                "pass one: `policy.wrap(env, instruction='…')`"
            )
        return checked_instruction(self.env.get_wrapper_attr("instruction"))

    def _convert(self, observation: Any, start: bool) -> Converted:
        """Return the converted observation; `start`: it is the first one of an episode."""
        rendered = None
        if self._map.uses_render:
            rendered = self.env.render()
        converted = self._map.convert(observation, rendered)
        if self._map.uses_render and self._render_size is None:
            height, width, _ = np.asarray(rendered).shape
            self._render_size = (height, width)
        if self._map.text:
            converted[INSTRUCTION] = self._instruction
        converted[EPISODE_START] = np.int64(start)
        return converted

    def reset(
        self,
        *,
        seed: int | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Converted, Info]:
        """Reset the env and read its instruction again."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._instruction = self._read_instruction()
        return self._convert(observation, start=True), info

    def step(self, action: Any) -> Step:
        """Step the env and convert its observation."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        converted = self._convert(observation, start=False)
        return converted, reward, terminated, truncated, info


class VectorWAMObservation(VectorWrapper):
    """Converts the observations of a vector env to the flat dict that a policy reads.

    The entries are those of `WAMObservation` with a batch axis. `episode_start` is correct in all
    three autoreset modes.

    Example:
        >>> import gymnasium as gym
        >>> from wam_policy.wrappers import VectorWAMObservation
        >>> envs = gym.make_vec(
        ...     "CartPole-v1", num_envs=2, render_mode="rgb_array", vectorization_mode="sync"
        ... )
        >>> envs = VectorWAMObservation(
        ...     envs, cameras={"front": "render()"}, state="", instruction="balance the pole"
        ... )
        >>> observations, infos = envs.reset(seed=0)
        >>> observations["images.front"].shape, observations["instruction"]
        ((2, 400, 600, 3), ('balance the pole', 'balance the pole'))
    """

    def __init__(
        self,
        env: VectorEnv,
        *,
        cameras: Mapping[str, str],
        rotated_cameras: tuple[str, ...] = (),
        state: str | None = None,
        state_indices: tuple[int, ...] | None = None,
        instruction: str | None = None,
        text: bool = True,
        render_size: tuple[int, int] | None = None,
        turned: tuple[str, ...] | None = None,
        pick: tuple[int, ...] | None = None,
    ) -> None:
        """Wrap a vector env.

        Args:
            env: Vector env to wrap.
            cameras: Camera -> path of its images in the observation, or "render()".
            rotated_cameras: Cameras whose images are upside down and are rotated by 180 degrees.
            state: Path of the state vector; None: no state.
            state_indices: Selected components of that vector, in this order; None: all.
            instruction: Language instruction of all sub-envs; None: the attribute `instruction`
                of each sub-env, read when an episode starts.
            text: Whether observations hold the instruction; without it their keys have no dots, and
                the attribute `instruction` holds it.
            render_size: Height and width of the images of `env.render()`; None: those of the first
                one, after a reset. The observation space is not known before.
            turned: Deprecated name of `rotated_cameras`.
            pick: Deprecated name of `state_indices`.

        Raises:
            EnvError: A path leads nowhere, or to something other than images or a vector, or
                there is no instruction.
        """
        super().__init__(env)
        rotated = renamed("turned", turned, "rotated_cameras", rotated_cameras or None)
        rotated = rotated or ()
        indices = renamed("pick", pick, "state_indices", state_indices)
        self._map = ObservationMap(dict(cameras), rotated, state, indices, text)
        self._render_size = render_size
        self._fixed_instruction = instruction
        self._episodes = EpisodeTracker(env)
        self._instructions = self._read_instructions()
        self._single_space: spaces.Dict | None = None
        self._space: spaces.Space[Any] | None = None

        # Wrong paths are reported now. The size of rendered images is only known after a reset.
        self._map.check_render_mode(env)
        if not self._map.uses_render or render_size is not None:
            _ = self.observation_space

    @property  # type: ignore[misc]
    def single_observation_space(self) -> spaces.Dict:  # type: ignore[override]
        """Space of the converted observations of one sub-env.

        Raises:
            EnvError: A camera is rendered, its size was not given, and no env was reset yet.
        """
        if self._single_space is None:
            inner = self.env.single_observation_space
            self._single_space = self._map.space(inner, self._render_size)
        return self._single_space

    @property  # type: ignore[misc]
    def observation_space(self) -> spaces.Space[Any]:  # type: ignore[override]
        """Space of the converted observations of all sub-envs; see `single_observation_space`."""
        if self._space is None:
            self._space = batch_space(self.single_observation_space, self.num_envs)
        return self._space

    @property
    def instruction(self) -> tuple[str, ...]:
        """Instructions of the current episodes, one per sub-env."""
        return self._instructions

    def _read_instructions(self) -> tuple[str, ...]:
        """Return the given instruction for all sub-envs, else the current ones of the sub-envs."""
        if self._fixed_instruction is not None:
            return (checked_instruction(self._fixed_instruction),) * self.num_envs
        instructions = sub_env_attributes(self.env, "instruction")
        if instructions is None:
            raise EnvError(
                "the sub-envs have no attribute `instruction`; "
                "pass one: `policy.wrap(env, instruction='…')`"
            )
        return tuple(map(checked_instruction, instructions))

    def _convert(self, observations: Any, start: np.ndarray) -> Converted:
        """Return the converted observations; `start` [N]: they are the first of an episode."""
        if start.any():
            self._instructions = self._read_instructions()
        rendered = None
        if self._map.uses_render:
            rendered = self.env.render()
        converted = self._map.convert(observations, rendered)
        if self._map.uses_render and self._render_size is None:
            _, height, width, _ = np.asarray(rendered).shape
            self._render_size = (height, width)
        if self._map.text:
            converted[INSTRUCTION] = self._instructions
        converted[EPISODE_START] = start.astype(np.int64)
        return converted

    def reset(
        self,
        *,
        seed: int | list[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Converted, Info]:
        """Reset all sub-envs, or those selected by `options["reset_mask"]`."""
        # Before the env's reset, which removes the mask from `options`.
        start = self._episodes.reset(options)
        # Gymnasium annotates `seed` too narrowly: vector envs take a list as well.
        observations, infos = self.env.reset(seed=seed, options=options)  # type: ignore[arg-type]
        return self._convert(observations, start), infos

    def step(self, actions: Any) -> VectorStep:
        """Step the sub-envs and convert their observations."""
        observations, rewards, terminations, truncations, infos = self.env.step(actions)
        start = self._episodes.step(terminations, truncations)

        # Convert these before the instructions of the new episodes are read.
        if "final_obs" in infos:
            final = self._convert_final(infos["final_obs"])
            infos = infos | {"final_obs": final}
        converted = self._convert(observations, start)
        return converted, rewards, terminations, truncations, infos

    def _convert_final(self, observations: np.ndarray) -> np.ndarray:
        """Convert the last observations of episodes that ended in SAME_STEP mode.

        Rendered cameras are left out: the sub-envs show the next episode already.

        Args:
            observations: One observation per sub-env, None where no episode ended; object [N].

        Returns:
            Converted observations, None where no episode ended; object [N].
        """
        converted = np.full(self.num_envs, None, object)
        for i in np.flatnonzero(self._episodes.ended):
            final = self._map.convert(observations[i], None)
            if self._map.text:
                final[INSTRUCTION] = self._instructions[i]
            final[EPISODE_START] = np.int64(0)
            converted[i] = final
        return converted
