"""Configuration of a policy: frozen dataclasses that a `config.json` holds.

They describe what the policy observes, how it acts and how it was trained.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np

from wam_policy.contract import ActionLayout, check_names
from wam_policy.errors import ConfigError
from wam_policy.models.config import FastWAMConfig, LightWAMConfig
from wam_policy.models.fast_wam.variants import VARIANTS, ActionMode, VariantName
from wam_policy.normalize import Normalization
from wam_policy.utils.plain import from_plain as from_plain

FORMAT_VERSION = 1

DtypeName = Literal["float32", "bfloat16", "float16"]
Resize = Literal["exact", "cover", "stretch"]
Layout = Literal["row", "t"]
Pixels = Literal["uint8", "float"]
Family = Literal["fast_wam", "light_wam"]
Form = Literal["fat", "slim", "lean"]
"""All weights; only the trained weights; only the weights that acting needs, folded together."""
SIZES: dict[str, type[FastWAMConfig] | type[LightWAMConfig]] = {
    "fast_wam": FastWAMConfig,
    "light_wam": LightWAMConfig,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CameraConfig:
    """Cameras of the model, in canvas order, and how their images become one canvas."""

    names: tuple[str, ...]
    # Size of each image on the canvas, in pixels. In the layout "t" the first image is twice as
    # high and wide.
    height: int
    width: int
    resize: Resize = "exact"  # treatment of images of another size
    layout: Layout = "row"  # all side by side, or ("t") the first above the other two
    pixels: Pixels = "uint8"  # type of the pixels after resizing
    # Height and width that every image is resized to first; None: this step is left out.
    before: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_names("camera names", self.names)
        if min(self.height, self.width, *(self.before or ())) < 1:
            raise ConfigError(
                f"camera sizes must be positive, got {self.height}×{self.width} "
                f"and `before` {self.before}"
            )
        choices = {"resize": Resize, "layout": Layout, "pixels": Pixels}
        for name, literal in choices.items():
            value = getattr(self, name)
            allowed = typing.get_args(literal)
            if value not in allowed:
                raise ConfigError(f"unknown {name} {value!r}; choose from {allowed}")
        if self.layout == "t" and len(self.names) != 3:
            raise ConfigError(f"the layout 't' takes three cameras, got {list(self.names)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoConfig:
    """Future frames that the model was trained to predict."""

    frames: int  # pixel frames including the observation: 1 + 4·n
    stride: int  # env steps between consecutive frames

    def __post_init__(self) -> None:
        if self.frames < 1 or self.stride < 1 or self.frames % 4 != 1:
            raise ConfigError(
                f"`frames` must be 1 + 4·n and `stride` positive, "
                f"got {self.frames} and {self.stride}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class StateConfig:
    """Components of the proprioceptive state and their normalisation."""

    names: tuple[str, ...]
    normalization: Normalization

    def __post_init__(self) -> None:
        check_names("state names", self.names)
        self.normalization.check("state", len(self.names))


@dataclass(frozen=True, kw_only=True, slots=True)
class GripperSnap:
    """Rounding of gripper commands, with snapping to the closed end of their range.

    Commands are clipped to the range of the training data and rounded; those close to the minimum
    become the minimum. This is the rule of Light-WAM's server for its real robot
    (https://github.com/L1ziang/Light-WAM).
    """

    indices: tuple[int, ...]  # positions of the gripper commands in an action
    within: float  # distance to the minimum below which a command becomes the minimum

    def check(self, dim: int, normalization: Normalization) -> None:
        """Check that the rule fits the actions.

        Args:
            dim: Number of components of an action.
            normalization: Normalisation of the actions.

        Raises:
            ConfigError: An index or the distance is out of range, or statistics are missing.
        """
        in_range = all(0 <= index < dim for index in self.indices)
        if not self.indices or not in_range or self.within < 0:
            raise ConfigError(
                f"snapping grippers {list(self.indices)} within {self.within} "
                f"don't fit actions of {dim} components"
            )
        missing = {"min", "max"} - normalization.statistics.keys()
        if missing:
            raise ConfigError(f"a snapping gripper needs the action statistics {sorted(missing)}")

    def apply(self, actions: np.ndarray, normalization: Normalization) -> np.ndarray:
        """Return actions with snapped gripper commands.

        Args:
            actions: Denormalised actions, float32 [..., A].
            normalization: Normalisation of the actions, with the range of the training data.

        Returns:
            Actions, float32 [..., A].
        """
        indices = list(self.indices)
        low = np.asarray(normalization.statistics["min"], np.float32)[indices]
        high = np.asarray(normalization.statistics["max"], np.float32)[indices]

        grippers = np.round(np.clip(actions[..., indices], low, high))
        snapped = actions.copy()
        snapped[..., indices] = np.where(grippers - low <= self.within, low, grippers)
        return snapped


@dataclass(frozen=True, kw_only=True, slots=True)
class ActionConfig:
    """Layout, normalisation and execution of action chunks."""

    layout: ActionLayout
    normalization: Normalization
    horizon: int  # actions per chunk
    replan: int  # actions executed before the next chunk is predicted
    # Number of actions at the start of a chunk that were trained; None: all.
    supervised_steps: int | None = None
    # Decay of the weights that average overlapping chunks; None: only the newest is executed.
    ensemble: float | None = None
    snap: GripperSnap | None = None  # rounding of the gripper commands; None: no rounding

    def __post_init__(self) -> None:
        self.normalization.check("action", self.layout.dim)
        if not 1 <= self.replan <= self.horizon:
            raise ConfigError(
                f"`replan` must lie between 1 and the horizon {self.horizon}, got {self.replan}"
            )
        if self.supervised_steps is not None and not 1 <= self.supervised_steps <= self.horizon:
            raise ConfigError(
                f"`supervised_steps` must lie between 1 and {self.horizon}, "
                f"got {self.supervised_steps}"
            )
        if self.snap is not None:
            self.snap.check(self.layout.dim, self.normalization)
            if self.ensemble is not None:
                raise ConfigError(
                    "snapping gripper commands can't be averaged: remove `ensemble` or `snap`"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptConfig:
    """Conversion of an instruction to a prompt."""

    template: str  # contains {task} exactly once
    token_length: int  # prompts are padded with zero rows, or truncated, to this length

    def __post_init__(self) -> None:
        if self.template.count("{task}") != 1:
            raise ConfigError(f"the prompt template must hold {{task}} once, got {self.template!r}")
        if self.token_length < 1:
            raise ConfigError(f"`token_length` must be positive, got {self.token_length}")

    def prompt(self, instruction: str) -> str:
        """Return the prompt of an instruction."""
        return self.template.replace("{task}", instruction)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """Denoising of actions and imagined frames. See docs/method.md, "Sampling"."""

    steps: int  # denoising steps
    video_shift: float  # shift of the noise schedule of the frames
    # Shift of the noise schedule of the actions; None: one regression pass without noise.
    action_shift: float | None
    seed: int = 42  # of the initial noise
    # The same noise in every call (as in the reference implementations), or new noise.
    noise: Literal["fixed", "fresh"] = "fixed"
    # What the actions attend to while they are denoised; None: the default of the variant.
    mode: ActionMode | None = None

    def __post_init__(self) -> None:
        shifts = [self.video_shift]
        if self.action_shift is not None:
            shifts.append(self.action_shift)
        if self.steps < 1 or any(shift <= 0 for shift in shifts):
            raise ConfigError(f"the steps and shifts of sampling must be positive, got {self}")
        if self.noise not in ("fixed", "fresh"):
            raise ConfigError(f"`noise` must be 'fixed' or 'fresh', got {self.noise!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Location of a frozen component."""

    repo: str | None = None  # Hub id; None: this checkpoint
    subfolder: str = ""
    revision: str | None = None

    def __post_init__(self) -> None:
        path = PurePosixPath(self.subfolder)
        if path.is_absolute() or ".." in path.parts or "\\" in self.subfolder:
            raise ConfigError(
                f"`subfolder` must stay inside its repository, got {self.subfolder!r}"
            )
        if self.repo is None and not self.subfolder:
            raise ConfigError("a component of this checkpoint needs a `subfolder` of its own")


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """Frozen weights that a slim checkpoint refers to instead of holding them."""

    # Folder with a video expert: any policy of this package, or Wan converted by `wam convert`.
    source: Source
    dtype: DtypeName  # type that the weights are cast to before hashing
    sha256: str  # hash of the weights, by `hub.slim.digest`


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyConfig:
    """Complete configuration of a policy."""

    family: Family = "fast_wam"
    variant: VariantName | None = "fast"  # of a Fast-WAM
    model: FastWAMConfig | LightWAMConfig
    cameras: CameraConfig
    video: VideoConfig
    state: StateConfig | None
    action: ActionConfig
    prompt: PromptConfig
    sampling: SamplingConfig
    vae: Source
    text: Source | None  # None: only the prompt embeddings in the checkpoint are available
    dtype: DtypeName = "float32"  # type of the computation, independent of the stored weights
    # "reference" rounds at the same places as the training of the released weights.
    precision: Literal["fast", "reference"] = "fast"
    base: Base | None = None  # of a slim checkpoint; None: the checkpoint holds all its weights
    trained_on: str | None = None  # description of the training data for the model card
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for field, allowed in _LITERALS.items():
            value = getattr(self, field)
            if value not in allowed:
                names = ", ".join(str(name) for name in allowed)
                raise ConfigError(f"unknown {field} {value!r}; this version supports {names}")
        self._check_family()
        self.action_mode()  # raises for a mode that the variant was not trained for
        self._check_dimensions()

    def _check_family(self) -> None:
        """Check that the fields that depend on the family agree with it."""
        if not isinstance(self.model, SIZES[self.family]):
            raise ConfigError(
                f"`model` is a {type(self.model).__name__}, but the family is {self.family!r}; "
                f"it needs a {SIZES[self.family].__name__}"
            )
        is_fast_wam = self.family == "fast_wam"
        has_variant = self.variant is not None
        has_action_shift = self.sampling.action_shift is not None
        if has_variant != is_fast_wam or has_action_shift != is_fast_wam:
            raise ConfigError(
                f"a Fast-WAM has a `variant` and an `action_shift`, a Light-WAM has neither; "
                f"got {self.family!r} with variant {self.variant!r} "
                f"and action shift {self.sampling.action_shift}"
            )
        if self.base is not None and is_fast_wam:
            raise ConfigError(
                "`base` requires a Light-WAM, whose video expert is frozen; "
                "a Fast-WAM must hold all its weights"
            )

    def _check_dimensions(self) -> None:
        """Check that the sizes of the model agree with state, actions and video."""
        state_dim = None if self.state is None else len(self.state.names)
        if self.model.proprio_dim != state_dim:
            raise ConfigError(
                f"`model.proprio_dim` is {self.model.proprio_dim} "
                f"but the state has {state_dim} numbers"
            )
        action_dim = self.action.layout.dim
        if self.model.action_dim != action_dim:
            raise ConfigError(
                f"`model.action_dim` is {self.model.action_dim} "
                f"but the action layout has {action_dim} names"
            )
        span = (self.video.frames - 1) * self.video.stride
        if span != self.action.horizon:
            raise ConfigError(
                f"{self.video.frames} frames at stride {self.video.stride} span {span} steps, "
                f"but the action horizon is {self.action.horizon}"
            )

    @property
    def form(self) -> Form:
        """Part of the weights that the checkpoint holds; always "fat" for a Fast-WAM."""
        if self.base is not None:
            return "slim"
        if isinstance(self.model, LightWAMConfig) and self.model.lean_steps is not None:
            return "lean"
        return "fat"

    def action_mode(self, wanted: ActionMode | None = None) -> ActionMode:
        """Return how actions are sampled.

        Args:
            wanted: Requested mode; None: the mode of the configuration, else the default of the
                variant.

        Raises:
            ConfigError: The variant was not trained for the mode.
        """
        modes: tuple[ActionMode, ...] = ("first_frame",)
        if self.variant is not None:
            modes = VARIANTS[self.variant].modes
        mode = wanted or self.sampling.mode or modes[0]
        if mode not in modes:
            supported = " or ".join(repr(name) for name in modes)
            raise ConfigError(
                f"{self.variant or self.family!r} samples actions by {supported}, not by {mode!r}"
            )
        return mode

    def to_json(self) -> str:
        """Return the text of `config.json`."""
        return json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> PolicyConfig:
        """Parse the text of a `config.json` strictly.

        Raises:
            ConfigError: The text is not JSON, has a newer format, or an entry is missing, unknown,
                of the wrong type or not finite.
        """
        try:
            data = json.loads(text, parse_constant=_reject_constant)
        except json.JSONDecodeError as error:
            raise ConfigError(f"config.json is not valid JSON: {error}") from error
        if not isinstance(data, dict):
            raise ConfigError(f"config.json must hold an object, got {type(data).__name__}")

        version = data.get("format_version")
        if version is None:
            raise ConfigError(
                "config.json has no `format_version`: it is not a wam-policy checkpoint, "
                "perhaps one of another project"
            )
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise ConfigError(
                f"config.json has format version {version}, this wam-policy reads versions up to "
                f"{FORMAT_VERSION}: pip install -U wam-policy"
            )
        return from_plain(cls, data)


def _literal_values(hint: Any) -> tuple[Any, ...]:
    """Return the values of a `Literal`, or of a union of one with None."""
    values: list[Any] = []
    for argument in typing.get_args(hint):
        if typing.get_origin(argument) is Literal:
            values.extend(typing.get_args(argument))
        elif argument is type(None):
            values.append(None)
        else:
            values.append(argument)
    return tuple(values)


_HINTS = typing.get_type_hints(PolicyConfig)
# Field of `PolicyConfig` -> its allowed values.
_LITERALS = {
    name: _literal_values(_HINTS[name]) for name in ("family", "variant", "dtype", "precision")
}


def _reject_constant(name: str) -> float:
    """Raise an error for NaN or an infinity in JSON text."""
    raise ConfigError(
        f"config.json contains {name}, which is not a finite number; correct that entry"
    )
