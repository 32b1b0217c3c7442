"""What the released checkpoints were trained and evaluated with, as data.

Sources: spec/fastwam.md section 5; spec/lightwam.md section 5.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from wam_policy.config import (
    ActionConfig,
    CameraConfig,
    DtypeName,
    Family,
    GripperSnap,
    PolicyConfig,
    PromptConfig,
    SamplingConfig,
    Source,
    StateConfig,
    VideoConfig,
)
from wam_policy.contract import ActionLayout, EnvContract, Gripper
from wam_policy.errors import ConfigError
from wam_policy.models.config import FastWAMConfig, LightWAMConfig
from wam_policy.models.fast_wam.variants import VariantName
from wam_policy.normalize import Mode, Normalization

WAN = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"  # the frozen codec and text encoder of every Fast-WAM
LIGHT_WAN = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"  # of every Light-WAM

PROMPT = PromptConfig(
    template="A video recorded from a robot's point of view executing the following instruction: {task}",
    token_length=128,
)
JOINTS = tuple(
    f"{side}_{name}"
    for side in ("left", "right")
    for name in (*(f"joint_{i}" for i in range(6)), "gripper")
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """The contract of a family of checkpoints, but for what a file adds to it: sizes and statistics."""

    cameras: CameraConfig
    video: VideoConfig
    state_names: tuple[str, ...]
    layout: ActionLayout
    normalization: Mode  # of state and action
    horizon: int
    replan: int
    prompt: PromptConfig
    sampling: SamplingConfig
    wan: str = WAN  # Hub id of the frozen codec and text encoder
    snap: GripperSnap | None = None
    supervised_steps: int | None = None  # of a Light-WAM's chunk


PRESETS = {
    "libero": Preset(
        cameras=CameraConfig(names=("image", "wrist_image"), height=224, width=224, resize="cover"),
        video=VideoConfig(frames=9, stride=4),
        state_names=(
            "x",
            "y",
            "z",
            "axis_angle_x",
            "axis_angle_y",
            "axis_angle_z",
            "finger_left",
            "finger_right",
        ),
        layout=ActionLayout(
            names=(
                "delta_x",
                "delta_y",
                "delta_z",
                "delta_rotation_x",
                "delta_rotation_y",
                "delta_rotation_z",
                "gripper",
            ),
            control="end_effector_delta",
            gripper=Gripper(index=6, open=1.0, closed=0.0, binary=True),
        ),
        normalization="min_max",
        horizon=32,
        replan=10,
        prompt=PROMPT,
        sampling=SamplingConfig(steps=10, video_shift=5.0, action_shift=5.0),
    ),
    "robotwin": Preset(
        cameras=CameraConfig(
            names=("cam_high", "cam_left_wrist", "cam_right_wrist"),
            height=128,
            width=160,
            resize="stretch",
            layout="t",
        ),
        video=VideoConfig(frames=9, stride=4),
        state_names=JOINTS,
        layout=ActionLayout(
            names=JOINTS,
            control="joint_position",
            gripper=None,  # two of them, in the env's own units: numbers like any other
        ),
        normalization="z_score",
        horizon=32,
        replan=24,
        prompt=PROMPT,
        sampling=SamplingConfig(steps=10, video_shift=5.0, action_shift=5.0),
    ),
}

ENVS = {  # what the simulators declare of themselves, by the preset that drives them
    "libero": EnvContract(
        cameras={"image": "agentview_image", "wrist_image": "robot0_eye_in_hand_image"},
        rotated_cameras=("image", "wrist_image"),
        action=replace(PRESETS["libero"].layout, gripper=Gripper(index=6, open=-1.0, closed=1.0)),
    ),
    "robotwin": EnvContract(
        cameras={
            "cam_high": "head_camera",
            "cam_left_wrist": "left_camera",
            "cam_right_wrist": "right_camera",
        },
        action=PRESETS["robotwin"].layout,
    ),
}


def _light(preset: Preset, supervised_steps: int) -> Preset:
    """The contract of a Light-WAM for the same robot: its pictures are resized as in training, its actions read in one pass."""
    cameras = replace(preset.cameras, resize="stretch", pixels="float")
    if cameras.layout == "t":
        cameras = replace(cameras, before=(240, 320))  # the size its simulator draws
    sampling = replace(preset.sampling, action_shift=None)
    return replace(
        preset, cameras=cameras, sampling=sampling, wan=LIGHT_WAN, supervised_steps=supervised_steps
    )


LIGHT_PRESETS = {
    "libero": _light(PRESETS["libero"], 8),
    "robotwin": _light(PRESETS["robotwin"], 24),
    "real_robot": replace(
        _light(PRESETS["robotwin"], 24),
        snap=GripperSnap(
            indices=tuple(i for i, name in enumerate(JOINTS) if name.endswith("gripper")),
            within=5.0,
        ),
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleaseInfo:
    """What a file of the reference implementations doesn't say about itself."""

    preset: str  # key of `PRESETS`, or of `LIGHT_PRESETS`
    variant: VariantName | None = None  # of a Fast-WAM
    action_shift: float | None = (
        None  # of the flow schedule a Fast-WAM's actions are sampled with; releases differ
    )
    head_dim: int = 128
    supervised_steps: int | None = None  # so many first actions of a chunk were trained; None: all
    trained_on: str | None = None  # the data, in words
    proprio: bool = (
        True  # whether it reads the state; a file without that part would otherwise act blindly
    )

    def __post_init__(self) -> None:
        if self.preset not in LIGHT_PRESETS:
            raise ConfigError(f"no preset {self.preset!r}; there are {', '.join(LIGHT_PRESETS)}")


RELEASES = {  # by the names of their files in the repository yuanty/fastwam; sources: spec/fastwam.md sections 1.1 and 9
    "libero_uncond_2cam224": ReleaseInfo(preset="libero", variant="fast", action_shift=5.0),
    "robotwin_uncond_3cam_384": ReleaseInfo(preset="robotwin", variant="fast", action_shift=5.0),
    "libero_optional_idm_2cam224": ReleaseInfo(
        preset="libero", variant="optional_idm", action_shift=1.0
    ),
}


def release_config(
    trained: ReleaseInfo,
    sizes: FastWAMConfig | LightWAMConfig,
    *,
    state: Normalization | None,
    action: Normalization,
    dtype: DtypeName,
) -> PolicyConfig:
    """The contract of a file of a reference implementation.

    Args:
        trained: what the file doesn't say.
        sizes: of its model.
        state: normalisation of the state; None for a model without proprioception.
        action: normalisation of the actions.
        dtype: what it is computed in.

    Raises:
        ConfigError: the preset isn't this model's.
    """
    family: Family = "fast_wam" if isinstance(sizes, FastWAMConfig) else "light_wam"
    preset = preset_of(family, trained.preset)
    return PolicyConfig(
        family=family,
        variant=trained.variant,
        model=sizes,
        cameras=preset.cameras,
        video=preset.video,
        state=None if state is None else StateConfig(names=preset.state_names, normalization=state),
        action=ActionConfig(
            layout=preset.layout,
            normalization=action,
            horizon=preset.horizon,
            replan=preset.replan,
            supervised_steps=trained.supervised_steps,
            snap=preset.snap,
        ),
        prompt=preset.prompt,
        sampling=replace(preset.sampling, action_shift=trained.action_shift),
        vae=Source(repo=preset.wan, subfolder="vae"),
        text=Source(repo=preset.wan),
        dtype=dtype,
        precision="reference",
        trained_on=trained.trained_on,
    )


def preset_of(family: Family, name: str) -> Preset:
    """A preset of a family.

    Raises:
        ConfigError: the family has none of this name.
    """
    presets = PRESETS if family == "fast_wam" else LIGHT_PRESETS
    if name not in presets:
        raise ConfigError(
            f"no preset {name!r} of the family {family!r}; there are {', '.join(presets)}"
        )
    return presets[name]
