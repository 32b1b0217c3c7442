"""Validation of observations: from an env's dict to checked arrays with a batch axis.

An observation is a flat dict: `images.<camera>` uint8 [H, W, 3], `state` float [P] and
`instruction` str. A batched observation has one more axis in front (instructions: a sequence).
The optional entry `episode_start` marks the first observation of an episode. Without dots in its
keys, a camera is `images_<camera>`.
"""

# B batch, H W pixels, P components of the state

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wam_policy.errors import ObservationError
from wam_policy.utils.arrays import as_array

# Keys of an observation; `IMAGE` is a prefix.
IMAGE = "images."
IMAGE_WITHOUT_DOT = "images_"
STATE = "state"
INSTRUCTION = "instruction"
EPISODE_START = "episode_start"


@dataclass(frozen=True)
class Observation:
    """Checked arrays of a batch of observations."""

    images: dict[str, np.ndarray]  # camera -> uint8 [B, H, W, 3]
    state: np.ndarray | None  # float32 [B, P]
    instructions: tuple[str, ...]  # one per sample
    episode_start: np.ndarray  # bool [B]
    batched: bool  # False: the input was a single observation without a batch axis

    def __len__(self) -> int:
        return len(self.instructions)


def check_observation(
    observation: Any,
    cameras: Sequence[str],
    state_names: Sequence[str] | None,
    instruction: str | None = None,
) -> Observation:
    """Check an observation against the inputs of a policy.

    Args:
        observation: Flat dict as described at the top of this module; unknown keys are ignored.
        cameras: Required cameras.
        state_names: Name of every component of the state; None: the policy reads no state.
        instruction: Instruction of an observation that holds none.

    Returns:
        The checked arrays, always with a batch axis.

    Raises:
        ObservationError: An entry is missing, has the wrong type or shape, or is not finite.
    """
    if isinstance(observation, tuple):
        raise ObservationError(
            "expected an observation, got a tuple; "
            "unpack the result of reset: `observation, info = env.reset()`"
        )
    if not isinstance(observation, Mapping):
        raise ObservationError(
            "expected a dict with named cameras, state and instruction, "
            f"got {type(observation).__name__}; wrap the env: `env = policy.wrap(env)`"
        )

    if INSTRUCTION not in observation and instruction is not None:
        observation = {**observation, INSTRUCTION: instruction}
    images, batched = _check_images(observation, cameras)
    size = len(next(iter(images.values())))
    if size == 0:
        raise ObservationError("the batch is empty: pass at least one observation")

    state = None
    if state_names is not None:
        state = _check_state(observation, state_names, size, batched)
    instructions = _check_instructions(observation, size)
    no_starts = np.zeros(size, bool)
    episode_start = _check_episode_start(observation.get(EPISODE_START, no_starts), size)
    return Observation(images, state, instructions, episode_start, batched)


def _check_images(
    observation: Mapping[str, Any], cameras: Sequence[str]
) -> tuple[dict[str, np.ndarray], bool]:
    """Return the images of all cameras, uint8 [B, H, W, 3], and whether they came as a batch."""
    images = {name: _check_image(observation, name) for name in cameras}

    ranks = {image.ndim for image in images.values()}
    if len(ranks) != 1:
        shapes = {name: image.shape for name, image in images.items()}
        raise ObservationError(
            f"some cameras have a batch axis and others do not: {shapes}; "
            f"pass all of them as [H, W, 3] or all as [B, H, W, 3]"
        )
    batched = ranks.pop() == 4
    if not batched:
        images = {name: image[None] for name, image in images.items()}

    sizes = {name: len(image) for name, image in images.items()}
    if len(set(sizes.values())) != 1:
        raise ObservationError(f"all cameras must have the same batch size, got {sizes}")
    return images, batched


def _check_image(observation: Mapping[str, Any], name: str) -> np.ndarray:
    """Return the image of one camera, uint8 [H, W, 3] or [B, H, W, 3]."""
    key = IMAGE + name
    if key not in observation:
        key = IMAGE_WITHOUT_DOT + name
    if key not in observation:
        available = sorted(k.removeprefix(IMAGE) for k in observation if k.startswith(IMAGE))
        raise ObservationError(
            f"camera {name!r} is missing: the observation has {available or 'no cameras'}; "
            f"specify its path in `policy.wrap(env, cameras={{{name!r}: 'path'}})`"
        )
    image = as_array(observation[key], f"camera {name!r}", ObservationError)
    if image.dtype != np.uint8:
        raise ObservationError(
            f"camera {name!r}: expected uint8 in [0, 255], got {image.dtype}; "
            f"undo the scaling before converting, a plain cast would destroy the image"
        )
    if image.ndim not in (3, 4) or image.shape[-1] != 3:
        raise ObservationError(
            f"camera {name!r}: expected [H, W, 3] or [B, H, W, 3], got {list(image.shape)}; "
            f"move the colour channels to the last axis"
        )
    return image


def _check_state(
    observation: Mapping[str, Any], names: Sequence[str], size: int, batched: bool
) -> np.ndarray:
    """Return the state, float32 [B, P]."""
    if STATE not in observation:
        raise ObservationError(
            f"the observation has no 'state'; the policy needs the components {list(names)}: "
            f"`policy.wrap(env, state='path', state_names=(…))` adds it"
        )
    state = as_array(observation[STATE], "state", ObservationError)
    expected = (size, len(names)) if batched else (len(names),)
    if state.shape != expected or state.dtype.kind not in "fiu":
        raise ObservationError(
            f"state: expected {list(expected)} numbers ({', '.join(names)}), "
            f"got {state.dtype} {list(state.shape)}; "
            f"`policy.wrap(env, state=…)` selects the components"
        )

    state = state.reshape(size, len(names)).astype(np.float32)
    is_finite = np.isfinite(state).all(axis=0)
    invalid = sorted({name for name, finite in zip(names, is_finite, strict=True) if not finite})
    if invalid:
        raise ObservationError(
            f"state is not finite in {invalid}; the simulation or a sensor has failed"
        )
    return state


def _check_instructions(observation: Mapping[str, Any], size: int) -> tuple[str, ...]:
    """Return one instruction per sample; a single string applies to all of them."""
    if INSTRUCTION not in observation:
        raise ObservationError(
            "the observation has no 'instruction'; `policy.wrap(env, instruction='…')` adds one, "
            "and `policy.instruction` is that of observations without text"
        )
    value = observation[INSTRUCTION]
    if isinstance(value, np.ndarray) and value.ndim == 0:
        # What NumPy makes of a single sentence.
        value = value.item()
    instructions: tuple[Any, ...] = ()
    if isinstance(value, str):
        instructions = (value,) * size
    elif isinstance(value, (Sequence, np.ndarray)) and np.ndim(value) == 1:
        instructions = tuple(value)
    all_strings = all(isinstance(instruction, str) for instruction in instructions)
    if len(instructions) != size or not all_strings:
        raise ObservationError(
            f"instruction: expected {size} strings (or one for all samples), got {value!r:.200}; "
            f"`policy.wrap(env, instruction='…')` adds one"
        )
    # Plain `str`: NumPy's string type is a subclass with another representation.
    return tuple(str(instruction) for instruction in instructions)


def _check_episode_start(value: Any, size: int) -> np.ndarray:
    """Return the flags of the first observations of episodes, bool [B]."""
    flags = as_array(value, "episode_start", ObservationError)
    if flags.size != size:
        raise ObservationError(
            f"episode_start: expected {size} flags, got shape {list(flags.shape)}"
        )
    return flags.reshape(size).astype(bool)


def episode_flags(given: Any, size: int) -> np.ndarray:
    """Return the flags of an `episode_start` argument.

    Args:
        given: Flags of any shape with `size` elements; None: no episode starts.
        size: Number of samples.

    Returns:
        Flags, bool [size].

    Raises:
        ObservationError: The number of flags is not `size`.
    """
    if given is None:
        return np.zeros(size, bool)
    return _check_episode_start(given, size)
