"""Turns any env's observation into the flat dict a policy reads: cameras, state, instruction, episode start."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space

from wam_policy.errors import EnvError
from wam_policy.observation import EPISODE_START, IMAGE, INSTRUCTION, STATE
from wam_policy.wrappers.paths import RENDER, get_path

MAX_INSTRUCTION = 1024  # characters


class _ObservationMap(NamedTuple):
    """Where in an env's observation the policy's entries are, and how they are read; the same for one and for many."""

    cameras: dict[str, str]
    rotated_cameras: tuple[str, ...]
    state: str | None
    state_indices: tuple[int, ...] | None

    @property
    def rendered(self) -> bool:
        """Whether any camera is the picture of `env.render()`."""
        return RENDER in self.cameras.values()

    def space(self, inner: spaces.Space[Any], picture: Any, sentences: str) -> spaces.Dict:
        """The space of one observation, given the env's, a rendered picture (if any is used), and the characters that occur."""
        entries: dict[str, spaces.Space[Any]] = {}
        for name, path in self.cameras.items():
            if path == RENDER and not isinstance(picture, np.ndarray):
                raise EnvError(
                    f"camera {name!r}: env.render() gives no picture; make the env with render_mode='rgb_array'"
                )
            space = (
                spaces.Box(0, 255, picture.shape, picture.dtype.type)
                if path == RENDER
                else get_path(inner, path)
            )
            if (
                not isinstance(space, spaces.Box)
                or space.dtype != np.uint8
                or len(space.shape) != 3
                or space.shape[-1] != 3
            ):
                raise EnvError(
                    f"camera {name!r} at {path!r}: expected pictures, uint8 [H, W, 3], the env has {space}"
                )
            entries[IMAGE + name] = spaces.Box(0, 255, space.shape, np.uint8)
        if self.state is not None:
            space = get_path(inner, self.state)
            if not isinstance(space, spaces.Box) or len(space.shape) != 1:
                raise EnvError(f"state at {self.state!r}: expected a vector, the env has {space}")
            pick = (
                tuple(range(space.shape[0])) if self.state_indices is None else self.state_indices
            )
            if max(pick, default=0) >= space.shape[0]:
                raise EnvError(
                    f"state at {self.state!r} has {space.shape[0]} numbers, number {max(pick)} was asked for"
                )
            entries[STATE] = spaces.Box(-np.inf, np.inf, (len(pick),), np.float32)
        characters = frozenset(string.printable) | frozenset(sentences)
        entries[INSTRUCTION] = spaces.Text(MAX_INSTRUCTION, min_length=0, charset=characters)
        entries[EPISODE_START] = spaces.Discrete(2)
        return spaces.Dict(entries)

    def read(self, observation: Any, picture: Any) -> dict[str, Any]:
        """Pictures and state of one observation or of a batch; rendered cameras are left out where `picture` is None."""
        new: dict[str, Any] = {
            IMAGE + name: np.asarray(picture if path == RENDER else get_path(observation, path))
            for name, path in self.cameras.items()
            if path != RENDER or picture is not None
        }
        for name in self.rotated_cameras:
            if IMAGE + name in new:
                new[IMAGE + name] = rotate_180(new[IMAGE + name])
        if self.state is not None:
            values = np.asarray(get_path(observation, self.state), np.float32)
            new[STATE] = (
                values if self.state_indices is None else values[..., list(self.state_indices)]
            )
        return new


def rotate_180(picture: np.ndarray) -> np.ndarray:
    """Pictures [..., H, W, 3] turned by 180°."""
    return np.ascontiguousarray(picture[..., ::-1, ::-1, :])


def sub_env_attributes(env: VectorEnv, name: str) -> tuple[Any, ...] | None:
    """An attribute of every sub-env; None where one lacks it, or where the vector env can't tell."""
    inner: Any = env.unwrapped
    if not hasattr(inner, "call"):
        return None
    # Asking an AsyncVectorEnv for an attribute that isn't there kills its workers, so ask whether it is there first.
    return tuple(inner.get_attr(name)) if all(inner.call("has_wrapper_attr", name)) else None


class WAMObservation(gym.Wrapper[dict[str, Any], Any, Any, Any], gym.utils.RecordConstructorArgs):
    """Gives observations a policy can read.

    The new observation is a flat dict: `images.<camera>` uint8 [H, W, 3], `state` float32 [P] (if asked for),
    `instruction` str, and `episode_start`, 1 at an episode's first observation.

    Example:
        >>> import gymnasium as gym
        >>> from wam_policy.wrappers import WAMObservation
        >>> env = gym.make("CartPole-v1", render_mode="rgb_array")
        >>> env = WAMObservation(env, cameras={"front": "render()"}, state="", instruction="balance the pole")
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
    ) -> None:
        """Wrap an env.

        Args:
            env: the env.
            cameras: camera name -> path in the observation, or "render()".
            rotated_cameras: cameras whose pictures are upside down, to be turned by 180°.
            state: path of the state vector; None: no state.
            state_indices: which of its numbers, in which order; None: all.
            instruction: the sentence; None: the env's `instruction` attribute, read at every reset.

        Raises:
            EnvError: a path leads nowhere, or to something else than pictures or a vector.
        """
        gym.utils.RecordConstructorArgs.__init__(
            self,
            cameras=dict(cameras),
            rotated_cameras=rotated_cameras,
            state=state,
            state_indices=state_indices,
            instruction=instruction,
        )
        gym.Wrapper.__init__(self, env)
        self._places, self._given = (
            _ObservationMap(dict(cameras), rotated_cameras, state, state_indices),
            instruction,
        )
        self._instruction = self._sentence()
        picture = None
        if self._places.rendered:
            env.reset()
            picture = env.render()
        self.observation_space = self._places.space(
            env.observation_space, picture, self._instruction
        )

    def _sentence(self) -> str:
        if self._given is not None:
            return self._given
        if not self.env.has_wrapper_attr("instruction"):
            raise EnvError(
                "the env has no `instruction`; say it: `policy.wrap(env, instruction='…')`"
            )
        return str(self.env.get_wrapper_attr("instruction"))

    def _convert(self, observation: Any, start: bool) -> dict[str, Any]:
        new = self._places.read(observation, self.env.render() if self._places.rendered else None)
        return new | {INSTRUCTION: self._instruction, EPISODE_START: np.int64(start)}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reset the env; the instruction is read anew."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._instruction = self._sentence()
        return self._convert(observation, start=True), info

    def step(self, action: Any) -> tuple[dict[str, Any], Any, bool, bool, dict[str, Any]]:
        """Step the env."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._convert(observation, start=False), reward, terminated, truncated, info


class VectorWAMObservation(VectorWrapper):
    """The same for a vector env; `episode_start` is right in all three autoreset modes.

    Example:
        >>> import gymnasium as gym
        >>> from wam_policy.wrappers import VectorWAMObservation
        >>> envs = gym.make_vec("CartPole-v1", num_envs=2, render_mode="rgb_array", vectorization_mode="sync")
        >>> envs = VectorWAMObservation(envs, cameras={"front": "render()"}, state="", instruction="balance the pole")
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
    ) -> None:
        """Wrap a vector env; arguments and errors are those of `WAMObservation`."""
        super().__init__(env)
        self._places, self._given = (
            _ObservationMap(dict(cameras), rotated_cameras, state, state_indices),
            instruction,
        )
        self._mode = env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP)
        self._ended = np.zeros(
            env.num_envs, bool
        )  # sub-envs that the next step will reset (NEXT_STEP)
        self._instructions = self._sentences()
        picture = None
        if self._places.rendered:
            env.reset()
            picture = (env.render() or (None,))[0]
        space = self._places.space(
            env.single_observation_space, picture, "".join(self._instructions)
        )
        self.single_observation_space, self.observation_space = (
            space,
            batch_space(space, env.num_envs),
        )

    def _sentences(self) -> tuple[str, ...]:
        if self._given is not None:
            return (self._given,) * self.num_envs
        sentences = sub_env_attributes(self.env, "instruction")
        if sentences is None:
            raise EnvError(
                "the sub-envs have no `instruction`; say it: `policy.wrap(env, instruction='…')`"
            )
        return tuple(str(sentence) for sentence in sentences)

    def _convert(self, observations: Any, start: np.ndarray) -> dict[str, Any]:
        if start.any():
            self._instructions = self._sentences()
        pictures = np.stack(self.env.render() or ()) if self._places.rendered else None
        new = self._places.read(observations, pictures)
        return new | {INSTRUCTION: self._instructions, EPISODE_START: start.astype(np.int64)}

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reset the sub-envs, or those of `options["reset_mask"]`."""
        mask = (options or {}).get("reset_mask")
        start = np.ones(self.num_envs, bool) if mask is None else np.array(mask, bool)
        observations, infos = self.env.reset(seed=seed, options=options)  # type: ignore[arg-type]  # gymnasium: one only
        self._ended &= ~start
        return self._convert(observations, start), infos

    def step(
        self, actions: Any
    ) -> tuple[dict[str, Any], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step the sub-envs."""
        observations, rewards, terminations, truncations, infos = self.env.step(actions)
        ended = np.asarray(terminations) | np.asarray(truncations)
        start = np.zeros(self.num_envs, bool)
        if self._mode == AutoresetMode.SAME_STEP:
            start = ended
        elif self._mode == AutoresetMode.NEXT_STEP:
            start, self._ended = self._ended, ended
        if "final_obs" in infos:
            infos = infos | {"final_obs": self._convert_final(infos["final_obs"], ended)}
        return self._convert(observations, start), rewards, terminations, truncations, infos

    def _convert_final(self, finals: np.ndarray, ended: np.ndarray) -> np.ndarray:
        """The last observations of ended sub-envs (SAME_STEP), as the policy reads them; pictures of `render()` are gone."""
        converted = np.full(self.num_envs, None, object)
        for i in np.flatnonzero(ended):
            converted[i] = self._places.read(finals[i], None) | {
                INSTRUCTION: self._instructions[i],
                EPISODE_START: np.int64(0),
            }
        return converted
