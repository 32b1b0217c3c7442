"""Presets: the settings that the released checkpoints were trained and evaluated with.

They follow the configuration and evaluation files of https://github.com/yuantianyuan01/FastWAM and
https://github.com/L1ziang/Light-WAM. See docs/method.md, "Data and normalisation".
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

# Hub ids of the frozen VAE and text encoder.
WAN = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"  # of every Fast-WAM
LIGHT_WAN = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"  # of every Light-WAM

PROMPT = PromptConfig(
    template=(
        "A video recorded from a robot's point of view executing the following instruction: {task}"
    ),
    token_length=128,
)

# Joints of a robot with two arms, each with six joints and a gripper.
_ARM = ("joint_0", "joint_1", "joint_2", "joint_3", "joint_4", "joint_5", "gripper")
JOINTS = tuple(f"{side}_{name}" for side in ("left", "right") for name in _ARM)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """Configuration of the checkpoints for one robot, without model sizes and statistics."""

    cameras: CameraConfig
    video: VideoConfig
    state_names: tuple[str, ...]
    layout: ActionLayout
    normalization: Mode  # of state and actions
    horizon: int  # actions per chunk
    replan: int  # actions executed before the next chunk is predicted
    prompt: PromptConfig
    sampling: SamplingConfig
    wan: str = WAN  # Hub id of the frozen VAE and text encoder
    snap: GripperSnap | None = None  # rounding of the gripper commands
    supervised_steps: int | None = None  # trained actions at the start of a Light-WAM's chunk


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
            # The two grippers are ordinary components here, in the units of the env.
            gripper=None,
        ),
        normalization="z_score",
        horizon=32,
        replan=24,
        prompt=PROMPT,
        sampling=SamplingConfig(steps=10, video_shift=5.0, action_shift=5.0),
    ),
}

# Contracts of the simulators, by the preset for them.
ENVS = {
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
    """Return the preset of a Light-WAM for the robot of a Fast-WAM's preset.

    Args:
        preset: Preset of the Fast-WAM.
        supervised_steps: Trained actions at the start of a chunk.

    Returns:
        The preset with the differences of Light-WAM: images are resized for evaluation as in
        training, and the actions are regressed in one pass.
    """
    cameras = replace(preset.cameras, resize="stretch", pixels="float")
    if cameras.layout == "t":
        # The training data has the size that the simulator renders.
        cameras = replace(cameras, before=(240, 320))
    return replace(
        preset,
        cameras=cameras,
        sampling=replace(preset.sampling, action_shift=None),
        wan=LIGHT_WAN,
        supervised_steps=supervised_steps,
    )


_GRIPPERS = tuple(i for i, name in enumerate(JOINTS) if name.endswith("gripper"))
LIGHT_PRESETS = {
    "libero": _light(PRESETS["libero"], 8),
    "robotwin": _light(PRESETS["robotwin"], 24),
    "real_robot": replace(
        _light(PRESETS["robotwin"], 24), snap=GripperSnap(indices=_GRIPPERS, within=5.0)
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleaseInfo:
    """Settings that a checkpoint file of the reference implementations does not contain."""

    preset: str  # key of `PRESETS`, or of `LIGHT_PRESETS`
    variant: VariantName | None = None  # of a Fast-WAM
    # Shift of the noise schedule of a Fast-WAM's actions; the releases differ.
    action_shift: float | None = None
    head_dim: int = 128
    # Number of actions at the start of a chunk that were trained; None: all.
    supervised_steps: int | None = None
    trained_on: str | None = None  # description of the training data
    # Whether the model reads the state. Stating it protects from a file whose proprio encoder is
    # missing: that policy would ignore the state.
    proprio: bool = True

    def __post_init__(self) -> None:
        if self.preset not in LIGHT_PRESETS:
            raise ConfigError(f"no preset {self.preset!r}; choose from {', '.join(LIGHT_PRESETS)}")


# Releases by their file names in the Hub repository yuanty/fastwam, without ".pt".
RELEASES = {
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
    """Return the configuration of a checkpoint file of a reference implementation.

    Args:
        trained: Settings that the file does not contain.
        sizes: Sizes of its model.
        state: Normalisation of the state; None: the model has no proprioception.
        action: Normalisation of the actions.
        dtype: Type of the computation.

    Returns:
        The configuration.

    Raises:
        ConfigError: The preset does not belong to the family of the model.
    """
    family: Family = "fast_wam" if isinstance(sizes, FastWAMConfig) else "light_wam"
    preset = preset_of(family, trained.preset)

    state_config = None
    if state is not None:
        state_config = StateConfig(names=preset.state_names, normalization=state)
    return PolicyConfig(
        family=family,
        variant=trained.variant,
        model=sizes,
        cameras=preset.cameras,
        video=preset.video,
        state=state_config,
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
    """Return a preset of a family.

    Raises:
        ConfigError: The family has no preset of that name.
    """
    presets = PRESETS if family == "fast_wam" else LIGHT_PRESETS
    if name not in presets:
        raise ConfigError(
            f"no preset {name!r} of the family {family!r}; choose from {', '.join(presets)}"
        )
    return presets[name]
