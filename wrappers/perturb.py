"""Wrappers that perturb what a policy observes and commands, to measure its robustness.

Every perturbation is determined by the seed of `reset`, and never by the env's own random numbers
or by earlier episodes. Without a seed, an episode continues the sequence of the last seed, which is
a random one at first.
"""

from __future__ import annotations

import copy
import secrets
import zlib
from collections import deque
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from wam_policy.contract import EnvContract
from wam_policy.errors import EnvError
from wam_policy.wrappers.observation_map import camera_space
from wam_policy.wrappers.paths import RENDER, get_path, replace_path
from wam_policy.wrappers.perturbations import (
    IMAGE_PERTURBATIONS,
    add_vector_noise,
    check_perturbations,
    strength,
)

Info = dict[str, Any]
Step = tuple[Any, Any, bool, bool, Info]
EpisodeKey = tuple[int, int]  # latest seed, and number of episodes since it was given

# Names in the order in which they act; see `perturbations.SEVERITIES` for their strengths.
OBSERVATION_PERTURBATIONS = (*IMAGE_PERTURBATIONS, "state-noise", "latency")
ACTION_PERTURBATIONS = ("gripper-delay", "action-noise")


def perturb_env(env: gym.Env[Any, Any], perturb: Mapping[str, int]) -> gym.Env[Any, Any]:
    """Return an env with perturbations.

    The order in which they are given does not matter: they act in that of
    `perturbations.SEVERITIES`.

    Args:
        env: Env with an attribute `contract`, an `EnvContract`.
        perturb: Name of a perturbation -> severity from 1 to 5.

    Returns:
        The wrapped env; the env itself if there are no perturbations.

    Raises:
        ConfigError: A name is unknown, or a severity is out of range.
        EnvError: The env lacks what a perturbation needs.
    """
    ordered = check_perturbations(perturb)
    of_actions = {name: ordered[name] for name in ACTION_PERTURBATIONS if name in ordered}
    of_observations = {
        name: severity for name, severity in ordered.items() if name not in of_actions
    }
    if of_actions:
        env = PerturbAction(env, perturb=of_actions)
    if of_observations:
        env = PerturbObservation(env, perturb=of_observations)
    return env


class PerturbObservation(gym.Wrapper[Any, Any, Any, Any], gym.utils.RecordConstructorArgs):
    """Perturbs images and state, and delays observations.

    The env's arrays are never changed, so that an image that the env repeats is perturbed once.
    `render()` returns the env's own image. With `latency` an observation is d control steps old,
    or the first one of the episode; reward, flags and info are not delayed. The observation that
    was seen d steps ago has to exist, so an env with `draw_pixels` then draws every step.

    Example:
        >>> import gymnasium as gym
        >>> from wam_policy.contract import ActionLayout, EnvContract
        >>> from wam_policy.wrappers import PerturbObservation
        >>> env = gym.make("Pendulum-v1").unwrapped
        >>> env.contract = EnvContract(
        ...     cameras={"front": "render()"},
        ...     state="",
        ...     state_names=("cos", "sin", "speed"),
        ...     action=ActionLayout(names=("torque",), control="torque", gripper=None),
        ... )
        >>> first, _ = env.reset(seed=0)
        >>> perturbed = PerturbObservation(env, perturb={"state-noise": 1})
        >>> noisy, _ = perturbed.reset(seed=0)
        >>> bool(0 < abs(noisy - first).max() < 0.01)
        True
    """

    def __init__(self, env: gym.Env[Any, Any], *, perturb: Mapping[str, int]) -> None:
        """Wrap an env.

        Args:
            env: Env with an attribute `contract`, an `EnvContract`.
            perturb: Name of a perturbation in `OBSERVATION_PERTURBATIONS` -> severity.

        Raises:
            ConfigError: A name is unknown, or a severity is out of range.
            EnvError: The env has no contract, no state, or images that are not in the observation.
        """
        self._perturb = check_perturbations(perturb, OBSERVATION_PERTURBATIONS)
        gym.utils.RecordConstructorArgs.__init__(self, perturb=dict(self._perturb))
        gym.Wrapper.__init__(self, env)
        contract = _contract(env)

        # Several cameras may have the same image, which is perturbed once.
        self._cameras: dict[str, str] = {}
        self._images = [name for name in self._perturb if name in IMAGE_PERTURBATIONS]
        if self._images or "latency" in self._perturb:
            _check_cameras(contract, env.observation_space)
        if self._images:
            self._cameras = {path: name for name, path in contract.cameras.items()}

        self._state: str | None = None
        if "state-noise" in self._perturb:
            self._state_space = _state_space(contract, env.observation_space)
            self._state = contract.state

        self._delay = 0
        if "latency" in self._perturb:
            self._delay = strength("latency", self._perturb["latency"])
            # `ExecuteChunk` switches drawing off here, which does not reach the env.
            if env.has_wrapper_attr("draw_pixels"):
                self.draw_pixels = True

        self._recent: deque[Any] = deque(maxlen=self._delay + 1)  # observations, oldest first
        self._key = _first_key()
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, Info]:
        """Start an episode, whose perturbations the seed determines."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._key = _next_key(self._key, seed)
        self._steps = 0
        self._recent.clear()
        return self._perturbed(observation), info

    def step(self, action: Any) -> Step:
        """Step the env and perturb its observation."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._steps += 1
        return self._perturbed(observation), reward, terminated, truncated, info

    def _perturbed(self, observation: Any) -> Any:
        """Return the perturbed observation of the current step; the argument is not changed."""
        for path, camera in self._cameras.items():
            image = self._perturbed_image(np.asarray(get_path(observation, path)), camera)
            observation = replace_path(observation, path, image)

        if self._state is not None:
            rng = _generator(self._key, "state-noise", step=self._steps)
            state = add_vector_noise(
                np.asarray(get_path(observation, self._state)),
                strength("state-noise", self._perturb["state-noise"]),
                self._state_space.low,
                self._state_space.high,
                rng,
            )
            observation = replace_path(observation, self._state, state)

        if not self._delay:
            return observation
        # The env may write into its arrays later, and the caller into what it has received.
        self._recent.append(copy.deepcopy(observation))
        return copy.deepcopy(self._recent[0])

    def _perturbed_image(self, image: np.ndarray, camera: str) -> np.ndarray:
        """Return an image uint8 [H, W, 3] with all perturbations of images."""
        for name in self._images:
            perturbation = IMAGE_PERTURBATIONS[name]
            # What is constant in an episode is drawn again by the same generator.
            rng = _generator(
                self._key,
                name,
                camera=camera if perturbation.per_camera else "",
                step=self._steps if perturbation.per_step else 0,
            )
            image = perturbation.apply(image, strength(name, self._perturb[name]), rng)
        return image


class PerturbAction(gym.Wrapper[Any, np.ndarray, Any, Any], gym.utils.RecordConstructorArgs):
    """Delays the gripper command and adds noise to the other components of an action.

    With `gripper-delay` the gripper receives the command of d control steps ago, and in the first
    d steps of an episode the command to open.

    Example:
        >>> import gymnasium as gym
        >>> import numpy as np
        >>> from wam_policy.contract import ActionLayout, EnvContract
        >>> from wam_policy.wrappers import PerturbAction
        >>> env = gym.make("Pendulum-v1").unwrapped
        >>> env.contract = EnvContract(
        ...     cameras={"front": "render()"},
        ...     action=ActionLayout(names=("torque",), control="torque", gripper=None),
        ... )
        >>> env = PerturbAction(env, perturb={"action-noise": 2})
        >>> _ = env.reset(seed=0)
        >>> _ = env.step(np.zeros(1, np.float32))
        >>> bool(env.unwrapped.last_u != 0)
        True
    """

    def __init__(self, env: gym.Env[Any, Any], *, perturb: Mapping[str, int]) -> None:
        """Wrap an env.

        Args:
            env: Env with an attribute `contract`, an `EnvContract`.
            perturb: Name of a perturbation in `ACTION_PERTURBATIONS` -> severity.

        Raises:
            ConfigError: A name is unknown, or a severity is out of range.
            EnvError: The env has no contract or no gripper, or its actions have no bounds.
        """
        self._perturb = check_perturbations(perturb, ACTION_PERTURBATIONS)
        gym.utils.RecordConstructorArgs.__init__(self, perturb=dict(self._perturb))
        gym.Wrapper.__init__(self, env)
        layout = _contract(env).action
        self._space = _action_space(layout.dim, env.action_space)
        self._gripper = layout.gripper

        self._delay = 0
        if "gripper-delay" in self._perturb:
            if self._gripper is None:
                raise EnvError(
                    "the perturbation 'gripper-delay' needs a gripper, but the action layout of "
                    "the env's contract has none; declare it, or leave the perturbation out"
                )
            self._delay = strength("gripper-delay", self._perturb["gripper-delay"])

        # Standard deviation of the noise on every component.
        self._deviation = np.zeros(layout.dim)
        if "action-noise" in self._perturb:
            _check_bounds(self._space)
            half_range = (self._space.high.astype(np.float64) - self._space.low) / 2
            relative = strength("action-noise", self._perturb["action-noise"])
            self._deviation = relative * half_range
            if self._gripper is not None:
                self._deviation[self._gripper.index] = 0.0

        self._commands: deque[Any] = deque()  # of the gripper that have no effect yet
        self._key = _first_key()
        self._start_episode()

    def _start_episode(self) -> None:
        """Forget the commands of an earlier episode; the first ones open the gripper."""
        self._steps = 0
        self._commands.clear()
        if self._gripper is not None:
            self._commands.extend([self._gripper.open] * self._delay)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, Info]:
        """Start an episode, whose noise the seed determines."""
        self._key = _next_key(self._key, seed)
        self._start_episode()
        return self.env.reset(seed=seed, options=options)

    def step(self, action: np.ndarray) -> Step:
        """Execute the perturbed action; the argument is not changed.

        Args:
            action: Action [A] of the env.
        """
        perturbed = np.array(action, self._space.dtype)
        if self._delay and self._gripper is not None:
            self._commands.append(perturbed[self._gripper.index])
            perturbed[self._gripper.index] = self._commands.popleft()

        rng = _generator(self._key, "action-noise", step=self._steps)
        self._steps += 1
        perturbed = add_vector_noise(
            perturbed, self._deviation, self._space.low, self._space.high, rng
        )
        return self.env.step(perturbed)


# -- random numbers --------------------------------------------------------------------------------


def _first_key() -> EpisodeKey:
    """Return the key of an episode that starts without a seed."""
    return secrets.randbits(32), 0


def _next_key(key: EpisodeKey, seed: int | None) -> EpisodeKey:
    """Return the key of the next episode, whose seed may be None."""
    latest, count = key
    if seed is None:
        return latest, count + 1
    return seed, 0


def _generator(
    key: EpisodeKey, name: str, *, camera: str = "", step: int = 0
) -> np.random.Generator:
    """Return a generator of its own for a perturbation, a camera and a control step.

    Always as many numbers: NumPy takes a shorter seed for the same one with zeros at its end.
    """
    numbers = [*key, zlib.crc32(name.encode()), zlib.crc32(camera.encode()), step]
    return np.random.Generator(np.random.SFC64(numbers))


# -- what an env must have -------------------------------------------------------------------------


def _contract(env: gym.Env[Any, Any]) -> EnvContract:
    """Return the contract that an env declares."""
    contract = None
    if env.has_wrapper_attr("contract"):
        contract = env.get_wrapper_attr("contract")
    if not isinstance(contract, EnvContract):
        raise EnvError(
            f"perturbations find images, state and gripper by the env's attribute `contract`, "
            f"which must be a wam_policy.contract.EnvContract, got {contract!r}; set it on the env"
        )
    return contract


def _check_cameras(contract: EnvContract, space: spaces.Space[Any]) -> None:
    """Check that the images of all cameras are in the observation."""
    for name, path in contract.cameras.items():
        if path == RENDER:
            raise EnvError(
                f"camera {name!r} is the image of `render()`, which perturbations leave as it is; "
                f"put it into the observation, for example by "
                f"gymnasium.wrappers.AddRenderObservation, and declare its path in the contract"
            )
        camera_space(name, path, space, None)


def _state_space(contract: EnvContract, space: spaces.Space[Any]) -> spaces.Box:
    """Return the space of the state vector."""
    if contract.state is None:
        raise EnvError(
            "the perturbation 'state-noise' needs a state vector, but the env's contract has no "
            "`state`; declare its path, or leave the perturbation out"
        )
    state = get_path(space, contract.state)
    is_vector = isinstance(state, spaces.Box) and len(state.shape) == 1
    if not is_vector or not np.issubdtype(state.dtype, np.floating):
        raise EnvError(
            f"state at {contract.state!r}: the perturbation 'state-noise' needs a vector of "
            f"floats, the env has {state}; declare another path, or leave the perturbation out"
        )
    return state


def _action_space(dim: int, space: spaces.Space[Any]) -> spaces.Box:
    """Return the action space, after checking that it fits the contract's layout."""
    is_vector = isinstance(space, spaces.Box) and space.shape == (dim,)
    if not is_vector or not np.issubdtype(space.dtype, np.floating):
        raise EnvError(
            f"perturbations of actions need a Box of {dim} floats, as many as the contract's "
            f"action layout has names, the env has {space}; correct the layout, or perturb single "
            f"actions below `ExecuteChunk`"
        )
    assert isinstance(space, spaces.Box)
    return space


def _check_bounds(space: spaces.Box) -> None:
    """Check that all actions have bounds."""
    if not space.is_bounded():
        raise EnvError(
            f"the perturbation 'action-noise' is relative to the bounds of actions, but the env's "
            f"space {space} has none; give it bounds, for example by "
            f"gymnasium.wrappers.TransformAction"
        )
