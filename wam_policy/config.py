"""The configuration of a policy, as the frozen dataclasses that `config.json` holds."""

from __future__ import annotations

import dataclasses
import json
import typing
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

from wam_policy.contract import ActionLayout, check_names
from wam_policy.errors import ConfigError
from wam_policy.gripper import GripperSnap
from wam_policy.models.config import FastWAMConfig, LightWAMConfig
from wam_policy.models.fast_wam.variants import VARIANTS, ActionMode, VariantName
from wam_policy.normalize import Normalization
from wam_policy.utils.json_dataclass import from_plain

FORMAT_VERSION = 1

DtypeName = Literal["float32", "bfloat16", "float16"]
Resize = Literal["exact", "cover", "stretch"]
Layout = Literal["row", "t"]
Pixels = Literal["uint8", "float"]
Family = Literal["fast_wam", "light_wam"]
Form = Literal["fat", "slim", "lean"]
"""Weights a checkpoint holds: all; the trained ones; those that acting needs, folded together."""

# Largest numbers of a contract. They bound the memory and the time of a prediction; no policy comes
# close to them.
MAX_SIDE = 4096  # pixels of an image
MAX_CAMERAS = 16
MAX_HORIZON = 4096  # env steps of a chunk
MAX_TOKENS = 4096
MAX_STEPS = 1000  # denoising steps

SIZES: dict[str, type[FastWAMConfig] | type[LightWAMConfig]] = {
    "fast_wam": FastWAMConfig,
    "light_wam": LightWAMConfig,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CameraConfig:
    """Cameras of the model, and how their images become its one canvas.

    Attributes:
        names: Cameras in the order of the canvas.
        height: Height of each camera's image on the canvas, in pixels; in layout "t", the first
            image is twice as high and wide.
        width: Likewise.
        resize: How an image of another size is brought to this one: it is refused ("exact"),
            scaled and cropped ("cover"), or stretched.
        layout: All images side by side ("row"), or the first above the other two ("t").
        pixels: Resized images are rounded to integers ("uint8") or stay float32 ("float").
        before: Height and width that every image is resized to first.
    """

    names: tuple[str, ...]
    height: int
    width: int
    resize: Resize = "exact"
    layout: Layout = "row"
    pixels: Pixels = "uint8"
    before: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_names("camera names", self.names)
        if len(self.names) > MAX_CAMERAS:
            raise ConfigError(
                f"a canvas holds at most {MAX_CAMERAS} cameras, got {len(self.names)}"
            )
        sides = (self.height, self.width, *(self.before or ()))
        if not 1 <= min(sides) <= max(sides) <= MAX_SIDE:
            raise ConfigError(
                f"camera size must be from 1 to {MAX_SIDE} pixels, got {self.height}×{self.width}, "
                f"`before` {self.before}"
            )
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
    """Future frames that the model was trained to predict.

    Attributes:
        frames: Number of frames, the observed one included: 1 + 4·n.
        stride: Env steps from one frame to the next.
    """

    frames: int
    stride: int

    def __post_init__(self) -> None:
        if self.frames < 1 or self.stride < 1 or self.frames % 4 != 1:
            raise ConfigError(
                f"frames must be 1 + 4·n and `stride` positive, got {self.frames} and {self.stride}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class StateConfig:
    """The proprioceptive state."""

    names: tuple[str, ...]
    normalization: Normalization

    def __post_init__(self) -> None:
        check_names("state names", self.names)
        self.normalization.check("state", len(self.names))


@dataclass(frozen=True, kw_only=True, slots=True)
class ActionConfig:
    """A chunk of actions.

    Attributes:
        layout: Meaning of each number of an action.
        normalization: Normalisation of the actions.
        horizon: Actions per chunk.
        replan: Actions executed before the next chunk is predicted.
        supervised_steps: First actions of a chunk that were trained; None: all.
        ensemble: Decay of the weights by which overlapping chunks are averaged; None: the newest
            chunk is executed.
        snap: Rounding of the gripper commands.
    """

    layout: ActionLayout
    normalization: Normalization
    horizon: int
    replan: int
    supervised_steps: int | None = None
    ensemble: float | None = None
    snap: GripperSnap | None = None

    def __post_init__(self) -> None:
        self.normalization.check("action", self.layout.dim)
        if self.horizon > MAX_HORIZON:
            raise ConfigError(f"`horizon` must be at most {MAX_HORIZON}, got {self.horizon}")
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
                    "grippers that snap to their end cannot be averaged: "
                    "leave `ensemble` or `snap` out"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptConfig:
    """How an instruction becomes a prompt.

    Attributes:
        template: Text that holds {task} once.
        token_length: Number of tokens that prompts are padded to, with zero rows, or cut to.
        clean: Whether HTML entities and white space are cleaned before a prompt is embedded, as the
            reference implementations do and LeRobot does not.
    """

    template: str
    token_length: int
    clean: bool = True

    def __post_init__(self) -> None:
        if self.template.count("{task}") != 1:
            raise ConfigError(f"the prompt template must hold {{task}} once, got {self.template!r}")
        if not 1 <= self.token_length <= MAX_TOKENS:
            raise ConfigError(
                f"`token_length` must be from 1 to {MAX_TOKENS}, got {self.token_length}"
            )

    def prompt(self, instruction: str) -> str:
        """Return the prompt of an instruction."""
        return self.template.replace("{task}", instruction)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """How actions and imagined frames are denoised.

    Attributes:
        steps: Number of denoising steps.
        video_shift: Shift of the flow-matching schedule of the video.
        action_shift: Likewise of the actions; None for a Light-WAM, which predicts actions in one
            pass, without noise.
        seed: Seed of the initial noise.
        noise: The same noise at every call ("fixed", as the reference implementations do), or new
            noise ("fresh").
        mode: What the actions attend to while they are denoised; None: the variant's default.
    """

    steps: int
    video_shift: float
    action_shift: float | None
    seed: int = 42
    noise: Literal["fixed", "fresh"] = "fixed"
    mode: ActionMode | None = None

    def __post_init__(self) -> None:
        if (
            self.steps < 1
            or self.video_shift <= 0
            or (self.action_shift is not None and self.action_shift <= 0)
        ):
            raise ConfigError(f"steps and shifts must be positive, got {self}")
        if self.steps > MAX_STEPS:
            raise ConfigError(f"`steps` must be at most {MAX_STEPS}, got {self.steps}")
        if self.noise not in ("fixed", "fresh"):
            raise ConfigError(f"`noise` must be 'fixed' or 'fresh', got {self.noise!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where a frozen component is loaded from.

    Attributes:
        repo: Hub id; None: this checkpoint itself.
        subfolder: Folder in that repository.
        revision: Branch, tag or commit.
    """

    repo: str | None = None
    subfolder: str = ""
    revision: str | None = None

    def __post_init__(self) -> None:
        path = PurePosixPath(self.subfolder)
        is_odd = "\\" in self.subfolder or "\0" in self.subfolder or len(self.subfolder) > 255
        if path.is_absolute() or ".." in path.parts or is_odd:
            raise ConfigError(
                f"`subfolder` must stay inside its repository, got {self.subfolder!r}"
            )
        if self.repo is None and not self.subfolder:
            raise ConfigError("a part of this checkpoint itself needs a `subfolder` of its own")


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """Frozen weights that a slim checkpoint leaves to another checkpoint.

    Attributes:
        source: Folder with a video expert: a policy of this package, or Wan's as `wam convert`
            writes it.
        dtype: Dtype that those weights are cast to before they are hashed.
        sha256: Their hash, by `hub.frozen_base.digest`.
    """

    source: Source
    dtype: DtypeName
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyConfig:
    """The configuration of a policy.

    Attributes:
        family: "fast_wam" or "light_wam".
        variant: Attention variant of a Fast-WAM; None for a Light-WAM.
        model: Sizes of the model.
        cameras: Cameras, and how their images become one canvas.
        video: Future frames that the model predicts.
        state: Proprioceptive state; None: the model does not read it.
        action: Chunks of actions.
        prompt: How an instruction becomes a prompt.
        sampling: How actions and frames are denoised.
        vae: Source of the video codec.
        text: Source of the text encoder; None: the checkpoint's own table holds all its prompts.
        dtype: Dtype to compute in, whatever the file stores.
        precision: "reference" rounds where the released weights were trained to round.
        base: Frozen weights of a slim checkpoint; None: all weights are in its own file.
        trained_on: Training data, in words, for the model card.
        format_version: Version of this format.
    """

    family: Family = "fast_wam"
    variant: VariantName | None = "fast"
    model: FastWAMConfig | LightWAMConfig
    cameras: CameraConfig
    video: VideoConfig
    state: StateConfig | None
    action: ActionConfig
    prompt: PromptConfig
    sampling: SamplingConfig
    vae: Source
    text: Source | None
    dtype: DtypeName = "float32"
    precision: Literal["fast", "reference"] = "fast"
    base: Base | None = None
    trained_on: str | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        # Names that this version knows.
        for field, known in _LITERALS.items():
            value = getattr(self, field)
            if value not in known:
                raise ConfigError(
                    f"unknown {field} {value!r}; this version knows {', '.join(map(str, known))}"
                )

        # What a family has, and has not.
        if not isinstance(self.model, SIZES[self.family]):
            raise ConfigError(
                f"`model` holds the sizes of a {type(self.model).__name__}, "
                f"the family is {self.family!r}"
            )
        flow_matching = self.family == "fast_wam"
        has_variant = self.variant is not None
        has_action_shift = self.sampling.action_shift is not None
        if not has_variant == has_action_shift == flow_matching:
            raise ConfigError(
                f"a Fast-WAM has a `variant` and an `action_shift`, a Light-WAM has neither; "
                f"got {self.family!r} with {self.variant!r} and {self.sampling.action_shift}"
            )
        if self.base is not None and flow_matching:
            raise ConfigError(
                "only a Light-WAM, whose video expert is frozen, can leave its `base` to another "
                "checkpoint"
            )
        self.action_mode()

        # The model fits the state and the actions.
        state_dim = None if self.state is None else len(self.state.names)
        if self.model.proprio_dim != state_dim:
            raise ConfigError(
                f"`model.proprio_dim` is {self.model.proprio_dim} but the state has {state_dim} "
                "numbers"
            )
        if self.model.action_dim != self.action.layout.dim:
            raise ConfigError(
                f"`model.action_dim` is {self.model.action_dim} but the action layout has "
                f"{self.action.layout.dim} names"
            )

        # Video and actions span the same time.
        video_span = (self.video.frames - 1) * self.video.stride
        if video_span != self.action.horizon:
            raise ConfigError(
                f"{self.video.frames} frames at stride {self.video.stride} span {video_span} "
                f"steps, the action horizon is {self.action.horizon}"
            )

    @property
    def form(self) -> Form:
        """Weights that the checkpoint holds; a Fast-WAM checkpoint always holds all."""
        if self.base is not None:
            return "slim"
        if isinstance(self.model, LightWAMConfig) and self.model.lean_steps is not None:
            return "lean"
        return "fat"

    def action_mode(self, wanted: ActionMode | None = None) -> ActionMode:
        """Return how actions are sampled: as wanted, as configured, or by the variant's default.

        Raises:
            ConfigError: The variant was not trained for it.
        """
        modes: tuple[ActionMode, ...] = ("first_frame",)
        if self.variant is not None:
            modes = VARIANTS[self.variant].modes
        mode = wanted or self.sampling.mode or modes[0]
        if mode not in modes:
            raise ConfigError(
                f"{self.variant or self.family!r} samples actions by "
                f"{' or '.join(map(repr, modes))}, not by {mode!r}"
            )
        return mode

    def to_json(self) -> str:
        """Return the text of `config.json`."""
        return json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> PolicyConfig:
        """Read the text of a `config.json`, strictly.

        Raises:
            ConfigError: It is not JSON, an entry is missing, unknown or of a wrong type, a number
                is not finite, or the format is newer than this version.
        """
        try:
            data = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"config.json is not JSON: {error}") from error
        if not isinstance(data, dict):
            raise ConfigError(f"config.json must hold an object, got {type(data).__name__}")
        version = data.get("format_version")
        if version is None:
            raise ConfigError(
                "config.json has no `format_version`: it is not a wam-policy checkpoint, perhaps "
                "one of another project"
            )
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise ConfigError(
                f"config.json has format version {version}, this wam-policy reads up to "
                f"{FORMAT_VERSION}: pip install -U wam-policy"
            )
        return from_plain(cls, data)


def _literals(hint: Any) -> tuple[Any, ...]:
    """Return the values of a literal, or of a union of literals and None."""
    values: list[Any] = []
    for argument in typing.get_args(hint):
        if typing.get_origin(argument) is Literal:
            values.extend(_literals(argument))
        elif argument is type(None):
            values.append(None)
        else:
            values.append(argument)
    return tuple(values)


_LITERALS = {
    name: _literals(typing.get_type_hints(PolicyConfig)[name])
    for name in ("family", "variant", "dtype", "precision")
}


def _refuse_constant(name: str) -> float:
    """Refuse NaN and infinity, which JSON does not have but Python's parser reads."""
    raise ConfigError(f"config.json holds {name}, which is not a finite number; repair that entry")
