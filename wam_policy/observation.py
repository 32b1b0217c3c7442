"""The one door from an env's dict to checked arrays.

An observation is a flat dict: `images.<camera>` uint8 [H, W, 3], `state` float [P], `instruction` str; batched, each has one
more axis in front (instructions: a sequence). `episode_start` may say that an episode begins here.
"""

# B batch, H W pixels, P numbers of state

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wam_policy.errors import ObservationError

IMAGE, STATE, INSTRUCTION, EPISODE_START = "images.", "state", "instruction", "episode_start"


@dataclass(frozen=True)
class Observation:
    """Checked arrays of a batch."""

    images: dict[str, np.ndarray]  # camera -> uint8 [B, H, W, 3]
    state: np.ndarray | None  # float32 [B, P]
    instructions: tuple[str, ...]  # B sentences
    episode_start: np.ndarray  # bool [B]
    batched: bool  # False: one observation, without the batch axis

    def __len__(self) -> int:
        return len(self.instructions)


def check_observation(
    observation: Any, cameras: Sequence[str], state_names: Sequence[str] | None
) -> Observation:
    """Check an observation against what a policy needs.

    Args:
        observation: the flat dict this module describes; keys it doesn't name are ignored.
        cameras: the cameras that must be there.
        state_names: one per number of the state; None: the policy reads no state.

    Raises:
        ObservationError: something is missing, of another type or shape, or not finite.
    """
    if isinstance(observation, tuple):
        raise ObservationError(
            "expected an observation, got a tuple; `env.reset()` returns two: `observation, info = env.reset()`"
        )
    if not isinstance(observation, Mapping):
        raise ObservationError(
            f"expected a dict of named cameras, state and instruction, got {type(observation).__name__}; "
            f"wrap the env: `env = policy.wrap(env)`"
        )
    pictures = {name: _picture(observation, name) for name in cameras}
    ranks = {picture.ndim for picture in pictures.values()}
    if len(ranks) != 1:
        raise ObservationError("some cameras have a batch axis and some have none")
    batched = ranks.pop() == 4
    pictures = {name: picture if batched else picture[None] for name, picture in pictures.items()}
    sizes = {name: len(picture) for name, picture in pictures.items()}
    size = next(iter(sizes.values()))
    if set(sizes.values()) != {size}:
        raise ObservationError(f"cameras disagree about the batch size: {sizes}")
    return Observation(
        pictures,
        None if state_names is None else _state(observation, state_names, size, batched),
        _instructions(observation, size),
        _episode_start(observation.get(EPISODE_START, np.zeros(size, bool)), size),
        batched,
    )


def _picture(observation: Mapping[str, Any], name: str) -> np.ndarray:
    key = IMAGE + name
    if key not in observation:
        seen = sorted(k.removeprefix(IMAGE) for k in observation if k.startswith(IMAGE))
        raise ObservationError(
            f"camera {name!r} is missing: the observation has {seen or 'no cameras'}; "
            f"name it in `policy.wrap(env, cameras={{{name!r}: <where it is>}})`"
        )
    picture = np.asarray(observation[key])
    if picture.dtype != np.uint8:
        raise ObservationError(
            f"camera {name!r}: expected uint8 in [0, 255], got {picture.dtype}; undo the scaling, do not cast"
        )
    if picture.ndim not in (3, 4) or picture.shape[-1] != 3:
        raise ObservationError(
            f"camera {name!r}: expected [H, W, 3] or [B, H, W, 3], got {list(picture.shape)}; colours come last"
        )
    return picture


def _state(
    observation: Mapping[str, Any], names: Sequence[str], size: int, batched: bool
) -> np.ndarray:
    if STATE not in observation:
        raise ObservationError(f"the observation has no 'state'; the policy needs {list(names)}")
    state = np.asarray(observation[STATE])
    expected = (size, len(names)) if batched else (len(names),)
    if state.shape != expected or state.dtype.kind not in "fiu":
        raise ObservationError(
            f"state: expected {list(expected)} numbers ({', '.join(names)}), got {state.dtype} {list(state.shape)}; "
            f"`policy.wrap(env, state=…)` picks them"
        )
    state = state.reshape(size, len(names)).astype(np.float32)
    bad = sorted({names[i] for i in np.argwhere(~np.isfinite(state))[:, 1]})
    if bad:
        raise ObservationError(
            f"state isn't finite in {bad}; the simulation or a sensor has failed"
        )
    return state


def _instructions(observation: Mapping[str, Any], size: int) -> tuple[str, ...]:
    if INSTRUCTION not in observation:
        raise ObservationError(
            "the observation has no 'instruction'; `policy.wrap(env, instruction='…')` adds one"
        )
    given = observation[INSTRUCTION]
    sentences = (given,) * size if isinstance(given, str) else tuple(given)
    if len(sentences) != size or not all(isinstance(s, str) for s in sentences):
        raise ObservationError(
            f"instruction: expected {size} strings (or one for all), got {given!r}"
        )
    return tuple(str(s) for s in sentences)


def _episode_start(given: Any, size: int) -> np.ndarray:
    flags = np.asarray(given)
    if flags.size != size:
        raise ObservationError(
            f"episode_start: expected {size} flags, got shape {list(flags.shape)}"
        )
    return flags.reshape(size).astype(bool)


def episode_flags(given: Any, size: int) -> np.ndarray:
    """Flags of a caller's `episode_start` argument, bool [size]; None means that none begins."""
    return np.zeros(size, bool) if given is None else _episode_start(given, size)
