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

from wam_policy.contract import ActionLayout, check_names
from wam_policy.errors import ConfigError
from wam_policy.images import Layout, Pixels, Resize
from wam_policy.models.config import FastWAMConfig
from wam_policy.models.variants import VARIANTS, ActionMode, VariantName
from wam_policy.normalize import Normalization

FORMAT_VERSION = 1

T = TypeVar("T")
DtypeName = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CameraConfig:
    """Which cameras the model sees, in canvas order, and how their pictures become its one canvas."""

    names: tuple[str, ...]
    height: int  # of each camera's picture on the canvas, in pixels; in a "t" the first one's is twice as high and wide
    width: int
    resize: Resize = "exact"  # what happens to pictures of another size
    layout: Layout = "row"  # where they stand: side by side, or the first above the other two
    pixels: Pixels = "uint8"  # what resized pictures are rounded to

    def __post_init__(self) -> None:
        check_names("camera names", self.names)
        if self.height < 1 or self.width < 1:
            raise ConfigError(f"camera size must be positive, got {self.height}×{self.width}")
        for name, kind in (("resize", Resize), ("layout", Layout), ("pixels", Pixels)):
            if getattr(self, name) not in typing.get_args(kind):
                raise ConfigError(f"unknown {name} {getattr(self, name)!r}; there are {typing.get_args(kind)}")
        if self.layout == "t" and len(self.names) != 3:
            raise ConfigError(f"a canvas in the form of a T holds three cameras, got {list(self.names)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoConfig:
    """Which future frames the model was trained to predict."""

    frames: int  # pixel frames, the observation included: 1 + 4·n
    stride: int  # env steps from one to the next

    def __post_init__(self) -> None:
        if self.frames < 1 or self.stride < 1 or self.frames % 4 != 1:
            raise ConfigError(f"frames must be 1 + 4·n and `stride` positive, got {self.frames} and {self.stride}")


@dataclass(frozen=True, kw_only=True, slots=True)
class StateConfig:
    """What the proprioceptive state is."""

    names: tuple[str, ...]
    normalization: Normalization

    def __post_init__(self) -> None:
        check_names("state names", self.names)
        self.normalization.check("state", len(self.names))


@dataclass(frozen=True, kw_only=True, slots=True)
class ActionConfig:
    """What one chunk of actions is."""

    layout: ActionLayout
    normalization: Normalization
    horizon: int  # actions per chunk
    replan: int  # actions played before the next chunk is asked for

    def __post_init__(self) -> None:
        self.normalization.check("action", self.layout.dim)
        if not 1 <= self.replan <= self.horizon:
            raise ConfigError(f"`replan` must lie between 1 and the horizon {self.horizon}, got {self.replan}")


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
    """How actions are denoised."""

    steps: int
    video_shift: float
    action_shift: float
    seed: int = 42  # of the initial noise
    noise: Literal["fixed", "fresh"] = "fixed"  # at every call the same noise (as the references do), or new noise
    mode: ActionMode | None = None  # what the actions see while they are denoised; None: the variant's own way

    def __post_init__(self) -> None:
        if self.steps < 1 or self.video_shift <= 0 or self.action_shift <= 0:
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
            raise ConfigError(f"`subfolder` must stay inside its repository, got {self.subfolder!r}")
        if self.repo is None and not self.subfolder:
            raise ConfigError("a part of this checkpoint itself needs a `subfolder` of its own")


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyConfig:
    """The whole contract of a policy."""

    family: Literal["fast_wam"] = "fast_wam"
    variant: VariantName = "fast"
    model: FastWAMConfig
    cameras: CameraConfig
    video: VideoConfig
    state: StateConfig | None
    action: ActionConfig
    prompt: PromptConfig
    sampling: SamplingConfig
    vae: Source
    text: Source | None  # None: the checkpoint's own table of prompt embeddings is all there is
    dtype: DtypeName = "float32"  # computed in, whatever the file stores
    precision: Literal["fast", "reference"] = "fast"  # "reference" rounds where the released weights were trained to round
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for field, known in _LITERALS.items():
            if getattr(self, field) not in known:
                raise ConfigError(f"unknown {field} {getattr(self, field)!r}; this version knows {', '.join(known)}")
        self.action_mode()
        state_dim = None if self.state is None else len(self.state.names)
        if self.model.proprio_dim != state_dim:
            raise ConfigError(f"`model.proprio_dim` is {self.model.proprio_dim} but the state has {state_dim} numbers")
        if self.model.action_dim != self.action.layout.dim:
            raise ConfigError(
                f"`model.action_dim` is {self.model.action_dim} but the action layout has {self.action.layout.dim} names"
            )
        if (self.video.frames - 1) * self.video.stride != self.action.horizon:
            raise ConfigError(
                f"{self.video.frames} frames at stride {self.video.stride} span "
                f"{(self.video.frames - 1) * self.video.stride} steps, the action horizon is {self.action.horizon}"
            )

    def action_mode(self, wanted: ActionMode | None = None) -> ActionMode:
        """How actions are sampled: as wanted, else as the contract says, else the variant's own way.

        Raises:
            ConfigError: the variant wasn't trained for it.
        """
        modes = VARIANTS[self.variant].modes
        mode = wanted or self.sampling.mode or modes[0]
        if mode not in modes:
            raise ConfigError(
                f"the variant {self.variant!r} samples actions by {' or '.join(map(repr, modes))}, not by {mode!r}"
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


_LITERALS = {
    name: typing.get_args(typing.get_type_hints(PolicyConfig)[name]) for name in ("family", "variant", "dtype", "precision")
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
    required = {n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
    missing = sorted(required - set(data))
    if unknown or missing:
        raise ConfigError(f"config entry {where or 'root'!r}: missing {missing}, unknown {unknown}")
    return kind(**{name: _value(hints[name], value, f"{where}.{name}".lstrip(".")) for name, value in data.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _value(next(a for a in arguments if a is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        return from_plain(typing.cast(type, hint), value, where)
    if origin is tuple and isinstance(value, list):
        if arguments[-1] is not Ellipsis and len(arguments) != len(value):
            raise ConfigError(f"config entry {where!r}: expected {len(arguments)} values, got {value!r}")
        return tuple(_value(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        return {key: _value(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"config entry {where!r}: expected one of {list(arguments)}, got {value!r}")
        return value
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ConfigError(f"config entry {where!r}: {value} isn't finite")
        return float(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    raise ConfigError(f"config entry {where!r}: expected {getattr(hint, '__name__', hint)}, got {value!r}")
