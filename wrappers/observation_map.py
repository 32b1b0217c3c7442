"""The way from an env's observation to the entries that a policy reads, and their spaces."""

# H W pixels, P components of the state

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

from wam_policy.errors import EnvError
from wam_policy.observation import EPISODE_START, IMAGE, IMAGE_WITHOUT_DOT, INSTRUCTION, STATE
from wam_policy.utils.arrays import as_array
from wam_policy.wrappers.instruction_space import MAX_BYTES, InstructionSpace
from wam_policy.wrappers.paths import RENDER, get_path

Converted = dict[str, Any]  # flat dict of a policy's inputs


class ObservationMap(NamedTuple):
    """Location of the policy's entries in an env's observation, for one env or a batch."""

    cameras: dict[str, str]
    rotated_cameras: tuple[str, ...]
    state: str | None
    state_indices: tuple[int, ...] | None
    # Whether the instruction is an entry; without it, keys have no dots.
    text: bool

    @property
    def image_prefix(self) -> str:
        """Beginning of the keys of images."""
        return IMAGE if self.text else IMAGE_WITHOUT_DOT

    @property
    def uses_render(self) -> bool:
        """Whether any camera is the image of `env.render()`."""
        return RENDER in self.cameras.values()

    def check_render_mode(self, env: Any) -> None:
        """Check that an env that can render images was made to do so.

        Raises:
            EnvError: It was not.
        """
        modes = (env.metadata or {}).get("render_modes")
        if self.uses_render and modes and env.render_mode is None:
            raise EnvError(
                "a camera is the image of env.render(), but the env renders nothing: "
                "make the env with render_mode='rgb_array'"
            )

    def space(self, inner: spaces.Space[Any], render_size: tuple[int, int] | None) -> spaces.Dict:
        """Return the space of a single converted observation.

        Args:
            inner: Observation space of the env.
            render_size: Height and width of the images of `env.render()`; None: they are not known.

        Raises:
            EnvError: A path leads nowhere, or to something other than images or a vector.
        """
        entries: dict[str, spaces.Space[Any]] = {}
        for name, path in self.cameras.items():
            entries[self.image_prefix + name] = camera_space(name, path, inner, render_size)
        if self.state is not None:
            entries[STATE] = self._state_space(self.state, inner)

        if self.text:
            entries[INSTRUCTION] = InstructionSpace()
        entries[EPISODE_START] = spaces.Discrete(2)
        return spaces.Dict(entries)

    def _state_space(self, path: str, inner: spaces.Space[Any]) -> spaces.Box:
        """Return the space of the selected components of the state."""
        space = get_path(inner, path)
        if not isinstance(space, spaces.Box) or len(space.shape) != 1:
            raise EnvError(f"state at {path!r}: expected a vector, the env has {space}")
        size = space.shape[0]
        indices = self.state_indices
        if indices is None:
            indices = tuple(range(size))
        outside = [index for index in indices if not 0 <= index < size]
        if outside:
            raise EnvError(
                f"state at {path!r}: indices {outside} are out of range, "
                f"the vector has {size} components"
            )
        return spaces.Box(-np.inf, np.inf, (len(indices),), np.float32)

    def convert(self, observation: Any, rendered: Any) -> Converted:
        """Return the images and the state of one observation or of a batch.

        Args:
            observation: Observation of the env.
            rendered: Images that `env.render()` returned; None: rendered cameras are left out.

        Returns:
            Entry -> array: images [..., H, W, 3] and the state, float32 [..., P].
        """
        converted: Converted = {}
        for name, path in self.cameras.items():
            if path != RENDER:
                image = as_array(get_path(observation, path), f"camera {name!r}", EnvError)
            elif rendered is not None:
                image = _checked_render(name, rendered)
            else:
                continue
            if name in self.rotated_cameras:
                image = rotate_180(image)
            converted[self.image_prefix + name] = image

        if self.state is not None:
            state = as_array(get_path(observation, self.state), "state", EnvError)
            state = state.astype(np.float32)
            if self.state_indices is not None:
                state = state[..., list(self.state_indices)]
            converted[STATE] = state
        return converted


def _checked_render(name: str, rendered: Any) -> np.ndarray:
    """Return what `env.render()` returned, one image or a batch, if it is images.

    Args:
        name: Name of the camera, for the error message.
        rendered: Result of `env.render()`.

    Raises:
        EnvError: It is not.
    """
    image = np.asarray(rendered) if isinstance(rendered, (np.ndarray, list, tuple)) else None
    if image is None or image.dtype != np.uint8 or image.shape[-1:] != (3,) or image.ndim < 3:
        what = "no image" if image is None else f"{image.dtype} {list(image.shape)}"
        raise EnvError(
            f"camera {name!r}: env.render() returns {what}, expected uint8 [H, W, 3]; "
            f"make the env with render_mode='rgb_array'"
        )
    return image


def camera_space(
    name: str, path: str, inner: spaces.Space[Any], render_size: tuple[int, int] | None
) -> spaces.Box:
    """Return the space of the images of one camera.

    Args:
        name: Name of the camera, for error messages.
        path: Path of its images in the observation, or "render()".
        inner: Observation space of the env.
        render_size: Height and width of the images of `env.render()`; None: they are not known.

    Raises:
        EnvError: The path leads nowhere, or to something other than images.
    """
    if path != RENDER:
        space = get_path(inner, path)
    elif render_size is not None:
        return spaces.Box(0, 255, (*render_size, 3), np.uint8)
    else:
        raise EnvError(
            f"camera {name!r}: the size of env.render() is not known before the first reset, and "
            f"wrapping resets nothing; reset the env first, or pass "
            f"policy.wrap(env, render_size=(height, width))"
        )

    is_image = (
        isinstance(space, spaces.Box)
        and space.dtype == np.uint8
        and len(space.shape) == 3
        and space.shape[-1] == 3
    )
    if not is_image:
        raise EnvError(
            f"camera {name!r} at {path!r}: expected images, uint8 [H, W, 3], the env has {space}"
        )
    return spaces.Box(0, 255, space.shape, np.uint8)


def rotate_180(images: np.ndarray) -> np.ndarray:
    """Rotate images [..., H, W, 3] by 180 degrees."""
    return np.ascontiguousarray(images[..., ::-1, ::-1, :])


def checked_instruction(value: Any) -> str:
    """Return an instruction as plain text.

    Raises:
        EnvError: It is no text, or too long for the observation space.
    """
    if not isinstance(value, str) or not InstructionSpace().contains(value):
        raise EnvError(
            f"an instruction must be text of at most {MAX_BYTES} bytes, got {value!r:.200}"
        )
    return str(value)
