"""Turns any env's observation into the flat dict a policy reads: cameras, state, instruction, episode start."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space

from wam_policy.errors import EnvError
from wam_policy.observation import EPISODE_START, IMAGE, INSTRUCTION, STATE
from wam_policy.wrappers.paths import RENDER, at

MAX_INSTRUCTION = 1024  # characters


def _picture_space(space: Any, name: str, path: str) -> spaces.Box:
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8 or len(space.shape) != 3 or space.shape[-1] != 3:
        raise EnvError(f"camera {name!r} at {path!r}: expected pictures, uint8 [H, W, 3], the env has {space}")
    return spaces.Box(0, 255, space.shape, np.uint8)


def _state_space(space: spaces.Space[Any], path: str, pick: tuple[int, ...] | None) -> spaces.Box:
    place = at(space, path)
    if not isinstance(place, spaces.Box) or len(place.shape) != 1:
        raise EnvError(f"state at {path!r}: expected a vector, the env has {place}")
    dim = place.shape[0] if pick is None else len(pick)
    if pick is not None and pick and max(pick) >= place.shape[0]:
        raise EnvError(f"state at {path!r} has {place.shape[0]} numbers, number {max(pick)} was asked for")
    return spaces.Box(-np.inf, np.inf, (dim,), np.float32)


def _render_space(env: gym.Env[Any, Any]) -> spaces.Box:
    env.reset()
    picture = env.render()
    if not isinstance(picture, np.ndarray):
        raise EnvError(f"env.render() gives {type(picture).__name__}, not a picture: make the env with render_mode='rgb_array'")
    return spaces.Box(0, 255, picture.shape, picture.dtype.type)


def _text_space(instruction: str) -> spaces.Text:
    return spaces.Text(MAX_INSTRUCTION, min_length=0, charset=frozenset(string.printable) | frozenset(instruction))


def _pick(state: Any, pick: tuple[int, ...] | None) -> np.ndarray:
    values = np.asarray(state, np.float32)
    return values if pick is None else values[..., list(pick)]


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
        state: str | None = None,
        pick: tuple[int, ...] | None = None,
        instruction: str | None = None,
    ) -> None:
        """Wrap an env.

        Args:
            env: the env.
            cameras: camera name -> path in the observation, or "render()".
            state: path of the state vector; None: no state.
            pick: which of its numbers, in which order; None: all.
            instruction: the sentence; None: the env's `instruction` attribute, read at every reset.

        Raises:
            EnvError: a path leads nowhere, or to something else than pictures or a vector.
        """
        gym.utils.RecordConstructorArgs.__init__(self, cameras=dict(cameras), state=state, pick=pick, instruction=instruction)
        gym.Wrapper.__init__(self, env)
        self.cameras, self.state, self.pick, self._given = dict(cameras), state, pick, instruction
        inner = env.observation_space
        entries: dict[str, spaces.Space[Any]] = {}
        for name, path in self.cameras.items():
            space = _render_space(env) if path == RENDER else at(inner, path)
            entries[IMAGE + name] = _picture_space(space, name, path)
        if state is not None:
            entries[STATE] = _state_space(inner, state, pick)
        self._instruction = self._sentence()
        entries[INSTRUCTION] = _text_space(self._instruction)
        entries[EPISODE_START] = spaces.Discrete(2)
        self.observation_space = spaces.Dict(entries)

    def _sentence(self) -> str:
        if self._given is not None:
            return self._given
        if not self.env.has_wrapper_attr("instruction"):
            raise EnvError("the env has no `instruction`; say it: `policy.wrap(env, instruction='…')`")
        return str(self.env.get_wrapper_attr("instruction"))

    def _convert(self, observation: Any, start: bool) -> dict[str, Any]:
        new: dict[str, Any] = {
            IMAGE + name: np.asarray(self.env.render() if path == RENDER else at(observation, path))
            for name, path in self.cameras.items()
        }
        if self.state is not None:
            new[STATE] = _pick(at(observation, self.state), self.pick)
        return new | {INSTRUCTION: self._instruction, EPISODE_START: np.int64(start)}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
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
        state: str | None = None,
        pick: tuple[int, ...] | None = None,
        instruction: str | None = None,
    ) -> None:
        """Wrap a vector env; arguments and errors are those of `WAMObservation`."""
        super().__init__(env)
        self.cameras, self.state, self.pick, self._given = dict(cameras), state, pick, instruction
        self._mode = env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP)
        self._ended = np.zeros(env.num_envs, bool)  # sub-envs that the next step will reset (NEXT_STEP)
        inner = env.single_observation_space
        entries: dict[str, spaces.Space[Any]] = {}
        for name, path in self.cameras.items():
            space = self._render_space() if path == RENDER else at(inner, path)
            entries[IMAGE + name] = _picture_space(space, name, path)
        if state is not None:
            entries[STATE] = _state_space(inner, state, pick)
        self._instructions = self._sentences()
        entries[INSTRUCTION] = _text_space("".join(self._instructions))
        entries[EPISODE_START] = spaces.Discrete(2)
        self.single_observation_space = spaces.Dict(entries)
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)

    def _render_space(self) -> spaces.Box:
        self.env.reset()
        pictures = self.env.render()
        if not pictures or not isinstance(pictures[0], np.ndarray):
            raise EnvError("the sub-envs render no pictures: make them with render_mode='rgb_array'")
        return spaces.Box(0, 255, pictures[0].shape, pictures[0].dtype.type)

    def _sentences(self) -> tuple[str, ...]:
        if self._given is not None:
            return (self._given,) * self.num_envs
        sentences = sub_env_attributes(self.env, "instruction")
        if sentences is None:
            raise EnvError("the sub-envs have no `instruction`; say it: `policy.wrap(env, instruction='…')`")
        return tuple(str(sentence) for sentence in sentences)

    def _convert(self, observations: Any, start: np.ndarray) -> dict[str, Any]:
        if start.any():
            self._instructions = self._sentences()
        frames = np.stack(self.env.render() or ()) if RENDER in self.cameras.values() else None
        new: dict[str, Any] = {
            IMAGE + name: frames if path == RENDER else np.asarray(at(observations, path))
            for name, path in self.cameras.items()
        }
        if self.state is not None:
            new[STATE] = _pick(at(observations, self.state), self.pick)
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

    def step(self, actions: Any) -> tuple[dict[str, Any], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
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
            new: dict[str, Any] = {
                IMAGE + name: np.asarray(at(finals[i], path)) for name, path in self.cameras.items() if path != RENDER
            }
            if self.state is not None:
                new[STATE] = _pick(at(finals[i], self.state), self.pick)
            converted[i] = new | {INSTRUCTION: self._instructions[i], EPISODE_START: np.int64(0)}
        return converted
