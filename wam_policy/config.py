"""The whole contract of a policy, as frozen dataclasses that a `config.json` holds: what it sees, does and was trained with."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal, TypeVar

import numpy as np

from wam_policy.contract import ActionLayout, check_names
from wam_policy.errors import ConfigError
from wam_policy.models.config import FastWAMConfig, LightWAMConfig
from wam_policy.models.fast_wam.variants import VARIANTS, ActionMode, VariantName
from wam_policy.normalize import Normalization

FORMAT_VERSION = 1

T = TypeVar("T")
DtypeName = Literal["float32", "bfloat16", "float16"]
Resize = Literal["exact", "cover", "stretch"]
Layout = Literal["row", "t"]
Pixels = Literal["uint8", "float"]
Family = Literal["fast_wam", "light_wam"]
Form = Literal["fat", "slim", "lean"]
"""All weights; only those that were trained; those that acting needs, folded together."""
SIZES: dict[str, type[FastWAMConfig] | type[LightWAMConfig]] = {
    "fast_wam": FastWAMConfig,
    "light_wam": LightWAMConfig,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CameraConfig:
    """Which cameras the model sees, in canvas order, and how their pictures become its one canvas."""

    names: tuple[str, ...]
    height: int  # of each camera's picture on the canvas, in pixels; in a "t" the first one's is twice as high and wide
    width: int
    resize: Resize = "exact"  # what happens to pictures of another size
    layout: Layout = "row"  # where they stand: side by side, or the first above the other two
    pixels: Pixels = "uint8"  # what resized pictures are rounded to
    before: tuple[int, int] | None = (
        None  # height and width that every picture is brought to before that
    )

    def __post_init__(self) -> None:
        check_names("camera names", self.names)
        if min(self.height, self.width, *(self.before or ())) < 1:
            raise ConfigError(f"camera size must be positive, got {self.height}×{self.width}")
        for name, kind in (("resize", Resize), ("layout", Layout), ("pixels", Pixels)):
            if getattr(self, name) not in typing.get_args(kind):
                raise ConfigError(
                    f"unknown {name} {getattr(self, name)!r}; there are {typing.get_args(kind)}"
                )
        if self.layout == "t" and len(self.names) != 3:
            raise ConfigError(
                f"a canvas in the form of a T holds three cameras, got {list(self.names)}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoConfig:
    """Which future frames the model was trained to predict."""

    frames: int  # pixel frames, the observation included: 1 + 4·n
    stride: int  # env steps from one to the next

    def __post_init__(self) -> None:
        if self.frames < 1 or self.stride < 1 or self.frames % 4 != 1:
            raise ConfigError(
                f"frames must be 1 + 4·n and `stride` positive, got {self.frames} and {self.stride}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class StateConfig:
    """What the proprioceptive state is."""

    names: tuple[str, ...]
    normalization: Normalization

    def __post_init__(self) -> None:
        check_names("state names", self.names)
        self.normalization.check("state", len(self.names))


@dataclass(frozen=True, kw_only=True, slots=True)
class GripperSnap:
    """Gripper numbers are kept in the range of the training data, rounded, and drawn to the closed end when near it.

    Source: spec/lightwam.md section 5.5, the real robot's rule.
    """

    indices: tuple[int, ...]  # of the gripper numbers in an action
    within: float  # so close to the smallest value seen in training, the number becomes that value

    def check(self, dim: int, normalization: Normalization) -> None:
        """Refuse a rule that doesn't fit the actions."""
        if (
            not self.indices
            or not all(0 <= index < dim for index in self.indices)
            or self.within < 0
        ):
            raise ConfigError(
                f"grippers {list(self.indices)} within {self.within} don't fit actions of {dim} numbers"
            )
        missing = {"min", "max"} - normalization.statistics.keys()
        if missing:
            raise ConfigError(f"a snapping gripper needs the action statistics {sorted(missing)}")

    def apply(self, actions: np.ndarray, normalization: Normalization) -> np.ndarray:
        """Actions [..., A] with their gripper numbers snapped, float32."""
        snapped, places = actions.copy(), list(self.indices)
        low, high = (
            np.asarray(normalization.statistics[name], np.float32)[places]
            for name in ("min", "max")
        )
        grippers = np.round(np.clip(actions[..., places], low, high))
        snapped[..., places] = np.where(grippers - low <= self.within, low, grippers)
        return snapped


@dataclass(frozen=True, kw_only=True, slots=True)
class ActionConfig:
    """What one chunk of actions is."""

    layout: ActionLayout
    normalization: Normalization
    horizon: int  # actions per chunk
    replan: int  # actions played before the next chunk is asked for
    supervised_steps: int | None = None  # so many first actions of a chunk were trained; None: all
    ensemble: float | None = (
        None  # decay of the weights by which chunks that overlap are averaged; None: the newest plays
    )
    snap: GripperSnap | None = None  # what gripper numbers are rounded to

    def __post_init__(self) -> None:
        self.normalization.check("action", self.layout.dim)
        if not 1 <= self.replan <= self.horizon:
            raise ConfigError(
                f"`replan` must lie between 1 and the horizon {self.horizon}, got {self.replan}"
            )
        if self.supervised_steps is not None and not 1 <= self.supervised_steps <= self.horizon:
            raise ConfigError(
                f"`supervised_steps` must lie between 1 and {self.horizon}, got {self.supervised_steps}"
            )
        if self.snap is not None:
            self.snap.check(self.layout.dim, self.normalization)
            if self.ensemble is not None:
                raise ConfigError(
                    "grippers that snap to their end can't be averaged: leave `ensemble` or `snap` out"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptConfig:
    """How an instruction becomes a prompt."""

    template: str  # holds {task} once
    token_length: int  # prompts are padded with zero rows, or cut, to this many tokens

    def __post_init__(self) -> None:
        if self.template.count("{task}") != 1:
            raise ConfigError(f"the prompt template must hold {{task}} once, got {self.template!r}")
        if self.token_length < 1:
            raise ConfigError(f"`token_length` must be positive, got {self.token_length}")

    def prompt(self, instruction: str) -> str:
        """The prompt of an instruction."""
        return self.template.replace("{task}", instruction)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """How actions and imagined frames are denoised."""

    steps: int
    video_shift: float
    action_shift: float | None  # None: actions are read off in one pass, without noise
    seed: int = 42  # of the initial noise
    noise: Literal["fixed", "fresh"] = (
        "fixed"  # at every call the same noise (as the references do), or new noise
    )
    mode: ActionMode | None = (
        None  # what the actions see while they are denoised; None: the variant's own way
    )

    def __post_init__(self) -> None:
        if (
            self.steps < 1
            or self.video_shift <= 0
            or (self.action_shift is not None and self.action_shift <= 0)
        ):
            raise ConfigError(f"steps and shifts must be positive, got {self}")
        if self.noise not in ("fixed", "fresh"):
            raise ConfigError(f"`noise` must be 'fixed' or 'fresh', got {self.noise!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where a frozen part comes from."""

    repo: str | None = None  # Hub id; None: this checkpoint itself
    subfolder: str = ""
    revision: str | None = None

    def __post_init__(self) -> None:
        path = PurePosixPath(self.subfolder)
        if path.is_absolute() or ".." in path.parts or "\\" in self.subfolder:
            raise ConfigError(
                f"`subfolder` must stay inside its repository, got {self.subfolder!r}"
            )
        if self.repo is None and not self.subfolder:
            raise ConfigError("a part of this checkpoint itself needs a `subfolder` of its own")


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """The frozen weights that a slim checkpoint doesn't hold."""

    source: Source  # a folder with a video expert in it: any policy of this package, or what `wam convert` made of Wan's
    dtype: DtypeName  # that those weights are cast to before they are hashed
    sha256: str  # of them, by `hub.slim.digest`


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyConfig:
    """The whole contract of a policy."""

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
    text: Source | None  # None: the checkpoint's own table of prompt embeddings is all there is
    dtype: DtypeName = "float32"  # computed in, whatever the file stores
    precision: Literal["fast", "reference"] = (
        "fast"  # "reference" rounds where the released weights were trained to round
    )
    base: Base | None = None  # of a slim checkpoint; None: all weights are in its own file
    trained_on: str | None = None  # the data, in words, for the card
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for field, known in _LITERALS.items():
            if getattr(self, field) not in known:
                raise ConfigError(
                    f"unknown {field} {getattr(self, field)!r}; this version knows {', '.join(map(str, known))}"
                )
        if not isinstance(self.model, SIZES[self.family]):
            raise ConfigError(
                f"`model` holds the sizes of a {type(self.model).__name__}, the family is {self.family!r}"
            )
        flow_matching = self.family == "fast_wam"
        if (self.variant is not None) != flow_matching or (
            self.sampling.action_shift is not None
        ) != flow_matching:
            raise ConfigError(
                f"a Fast-WAM has a `variant` and an `action_shift`, a Light-WAM has neither; got {self.family!r} with "
                f"{self.variant!r} and {self.sampling.action_shift}"
            )
        if self.base is not None and flow_matching:
            raise ConfigError(
                "only a Light-WAM, whose video expert is frozen, can leave its `base` to another checkpoint"
            )
        self.action_mode()
        state_dim = None if self.state is None else len(self.state.names)
        if self.model.proprio_dim != state_dim:
            raise ConfigError(
                f"`model.proprio_dim` is {self.model.proprio_dim} but the state has {state_dim} numbers"
            )
        if self.model.action_dim != self.action.layout.dim:
            raise ConfigError(
                f"`model.action_dim` is {self.model.action_dim} but the action layout has {self.action.layout.dim} names"
            )
        if (self.video.frames - 1) * self.video.stride != self.action.horizon:
            raise ConfigError(
                f"{self.video.frames} frames at stride {self.video.stride} span "
                f"{(self.video.frames - 1) * self.video.stride} steps, the action horizon is {self.action.horizon}"
            )

    @property
    def form(self) -> Form:
        """What of a Light-WAM a checkpoint holds; a Fast-WAM's is always whole."""
        if self.base is not None:
            return "slim"
        return (
            "lean"
            if isinstance(self.model, LightWAMConfig) and self.model.lean_steps is not None
            else "fat"
        )

    def action_mode(self, wanted: ActionMode | None = None) -> ActionMode:
        """How actions are sampled: as wanted, else as the contract says, else the variant's own way.

        Raises:
            ConfigError: the variant wasn't trained for it.
        """
        modes: tuple[ActionMode, ...] = (
            ("first_frame",) if self.variant is None else VARIANTS[self.variant].modes
        )
        mode = wanted or self.sampling.mode or modes[0]
        if mode not in modes:
            raise ConfigError(
                f"{self.variant or self.family!r} samples actions by {' or '.join(map(repr, modes))}, not by {mode!r}"
            )
        return mode

    def to_json(self) -> str:
        """The text of `config.json`."""
        return json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> PolicyConfig:
        """Read the text of a `config.json`, strictly.

        Raises:
            ConfigError: not JSON, a missing, unknown or wrongly typed entry, a number that isn't finite, a newer format.
        """
        try:
            data = json.loads(text, parse_constant=_refuse_constant)
        except json.JSONDecodeError as error:
            raise ConfigError(f"config.json isn't JSON: {error}") from error
        if not isinstance(data, dict):
            raise ConfigError(f"config.json must hold an object, got {type(data).__name__}")
        version = data.get("format_version")
        if version is None:
            raise ConfigError(
                "config.json has no `format_version`: it isn't a wam-policy checkpoint, perhaps one of another project"
            )
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise ConfigError(
                f"config.json has format version {version}, this wam-policy reads up to {FORMAT_VERSION}: "
                f"pip install -U wam-policy"
            )
        return from_plain(cls, data)


def _literals(hint: Any) -> tuple[Any, ...]:
    """The values of a literal or of a union with one; `NoneType` stands for itself."""
    values = [
        _literals(a) if typing.get_origin(a) is Literal else (a,) for a in typing.get_args(hint)
    ]
    return tuple(None if value is type(None) else value for part in values for value in part)


_LITERALS = {
    name: _literals(typing.get_type_hints(PolicyConfig)[name])
    for name in ("family", "variant", "dtype", "precision")
}


def _refuse_constant(name: str) -> float:
    raise ConfigError(f"config.json holds {name}, which isn't a finite number; repair that entry")


def from_plain(kind: type[T], data: Any, where: str = "") -> T:
    """Build dataclass `kind` from plain JSON data, refusing whatever doesn't fit its annotations."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"config entry {where or 'root'!r}: expected an object, got {data!r}")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(fields))
    required = {
        n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(data))
    if unknown or missing:
        raise ConfigError(f"config entry {where or 'root'!r}: missing {missing}, unknown {unknown}")
    return kind(
        **{
            name: _value(hints[name], value, f"{where}.{name}".lstrip("."))
            for name, value in data.items()
        }
    )


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        kinds = [a for a in arguments if a is not type(None)]
        if len(kinds) > 1 and isinstance(
            value, Mapping
        ):  # several dataclasses: the one that has most of these fields
            kinds.sort(
                key=lambda kind: (
                    -len(value.keys() & {field.name for field in dataclasses.fields(kind)})
                )
            )
        return _value(kinds[0], value, where)
    if dataclasses.is_dataclass(hint):
        return from_plain(typing.cast(type, hint), value, where)
    if origin is tuple and isinstance(value, list):
        if arguments[-1] is not Ellipsis and len(arguments) != len(value):
            raise ConfigError(
                f"config entry {where!r}: expected {len(arguments)} values, got {value!r}"
            )
        return tuple(_value(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return {key: _value(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(
                f"config entry {where!r}: expected one of {list(arguments)}, got {value!r}"
            )
        return value
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ConfigError(f"config entry {where!r}: {value} isn't finite")
        return float(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    raise ConfigError(
        f"config entry {where!r}: expected {getattr(hint, '__name__', hint)}, got {value!r}"
    )
