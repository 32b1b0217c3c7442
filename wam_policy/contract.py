"""What an environment and a checkpoint declare about themselves: a convention is stated on both sides and applied once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field

from wam_policy.errors import ConfigError
from wam_policy.utils.deprecation import renamed


def check_names(what: str, names: tuple[str, ...]) -> None:
    """Refuse names that are empty or not distinct."""
    if not names or len(set(names)) != len(names) or not all(names):
        raise ConfigError(f"`{what}` must be distinct, non-empty names, got {list(names)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Gripper:
    """Which number of an action is the gripper, and what it means."""

    index: int  # position in the action
    open: float  # the value that opens it
    closed: float  # the value that closes it
    binary: bool = False  # True: the side that declares it takes only these two values

    def __post_init__(self) -> None:
        if self.open == self.closed:
            raise ConfigError(f"gripper: `open` and `closed` must differ, both are {self.open}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ActionLayout:
    """What the numbers of one action mean."""

    names: tuple[str, ...]  # one a number, for example "delta_x"
    control: str  # what is commanded, for example "end_effector_delta" or "joint_position"
    gripper: Gripper | None  # None says that there is no gripper

    def __post_init__(self) -> None:
        check_names("action names", self.names)
        if not self.control:
            raise ConfigError(
                "`control` must say what the action commands, for example 'end_effector_delta'"
            )
        if self.gripper is not None and not 0 <= self.gripper.index < len(self.names):
            raise ConfigError(
                f"gripper index {self.gripper.index} is outside the {len(self.names)} action names"
            )

    @property
    def dim(self) -> int:
        """Numbers per action."""
        return len(self.names)


@dataclass(frozen=True, kw_only=True, slots=True)
class EnvContract:
    """What an environment declares: where its cameras, state and instruction are, and what its actions mean.

    A path names a place in the observation: keys joined by dots ("pixels.front"), "" for the whole observation, and
    "render()" for the picture of `env.render()`.
    """

    cameras: Mapping[str, str]  # camera name -> path of a uint8 [H, W, 3] picture
    action: ActionLayout
    state: str | None = None  # path of a float vector
    state_names: tuple[str, ...] = field(default=())  # one a number of that vector
    instruction: str | None = None  # the sentence itself; None: the env's `instruction` attribute
    # Cameras whose pictures are upside down: the wrapper rotates them by 180 degrees.
    rotated_cameras: tuple[str, ...] = field(default=())
    turned: InitVar[tuple[str, ...] | None] = None  # deprecated name of `rotated_cameras`

    def __post_init__(self, turned: tuple[str, ...] | None) -> None:
        rotated = renamed("turned", turned, "rotated_cameras", self.rotated_cameras or None)
        object.__setattr__(self, "rotated_cameras", rotated or ())
        check_names("camera names", tuple(self.cameras))
        if unknown := sorted(set(self.rotated_cameras) - set(self.cameras)):
            raise ConfigError(
                f"`rotated_cameras` names cameras there aren't: {unknown}; there are {sorted(self.cameras)}"
            )
        if self.state is not None:
            check_names("state names", self.state_names)
