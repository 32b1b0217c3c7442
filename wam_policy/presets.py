"""What the released checkpoints were trained and evaluated with, as data.

Source: the training and evaluation configs in the repositories of Fast-WAM and Light-WAM.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from wam_policy.config import (
    ActionConfig,
    CameraConfig,
    DtypeName,
    Family,
    PolicyConfig,
    PromptConfig,
    SamplingConfig,
    Source,
    StateConfig,
    VideoConfig,
)
from wam_policy.contract import ActionLayout, EnvContract, Gripper
from wam_policy.errors import ConfigError
from wam_policy.gripper import GripperSnap
from wam_policy.models.config import FastWAMConfig, LightWAMConfig
from wam_policy.models.fast_wam.variants import VariantName
from wam_policy.normalize import Mode, Normalization
from wam_policy.utils import documents
from wam_policy.utils.json_dataclass import from_plain

# Frozen codec and text encoder of every Fast-WAM, and of every Light-WAM.
WAN = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
LIGHT_WAN = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"

PROMPT = PromptConfig(
    template=(
        "A video recorded from a robot's point of view executing the following instruction: {task}"
    ),
    token_length=128,
)
SAMPLING = SamplingConfig(steps=10, video_shift=5.0, action_shift=5.0)
JOINTS = tuple(
    f"{side}_{name}"
    for side in ("left", "right")
    for name in (*(f"joint_{i}" for i in range(6)), "gripper")
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """Configuration of a group of checkpoints, without sizes and statistics.

    Attributes:
        cameras: Cameras, and how their images become one canvas.
        video: Future frames that the model predicts.
        state_names: Names of the state's numbers.
        layout: Meaning of each number of an action.
        normalization: Normalisation mode of state and actions.
        horizon: Actions per chunk.
        replan: Actions executed before the next chunk is predicted.
        prompt: How an instruction becomes a prompt.
        sampling: How actions and frames are denoised.
        wan: Hub id of the frozen codec and text encoder.
        snap: Rounding of the gripper commands.
        supervised_steps: First actions of a chunk that were trained; None: all.
    """

    cameras: CameraConfig
    video: VideoConfig
    state_names: tuple[str, ...]
    layout: ActionLayout
    normalization: Mode
    horizon: int
    replan: int
    prompt: PromptConfig = PROMPT
    sampling: SamplingConfig = SAMPLING
    wan: str = WAN
    snap: GripperSnap | None = None
    supervised_steps: int | None = None


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
        sampling=SAMPLING,
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
            # Two grippers, in units of the env: treated as any other number.
            gripper=None,
        ),
        normalization="z_score",
        horizon=32,
        replan=24,
        prompt=PROMPT,
        sampling=SAMPLING,
    ),
}

# What the simulators declare about themselves, by the preset of the policies for them.
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
    """Return the preset of a Light-WAM for the same robot.

    It resizes images as in training, and predicts actions in one pass.
    """
    cameras = replace(preset.cameras, resize="stretch", pixels="float")
    if cameras.layout == "t":
        # The size that the simulator renders.
        cameras = replace(cameras, before=(240, 320))
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
    """What a file of the reference implementations does not record about itself.

    Attributes:
        preset: Key of `PRESETS` or `LIGHT_PRESETS`, or a JSON file (`robot.json`) that holds the
            fields of a `Preset`, for one's own robot.
        variant: Attention variant of a Fast-WAM.
        action_shift: Shift of the schedule that a Fast-WAM's actions are sampled with; releases
            differ.
        head_dim: Channels per attention head.
        supervised_steps: First actions of a chunk that were trained; None: all.
        trained_on: Training data, in words.
        proprio: Whether the policy was trained with a state; a file that lacks the proprio encoder
            is refused if so, because it would ignore the state.
        state_groups: Groups of numbers in the file of statistics, in the order in which they form
            the state; empty for the one group of the released files.
        action_groups: Likewise of the actions.
    """

    preset: str
    variant: VariantName | None = None
    action_shift: float | None = None
    head_dim: int = 128
    supervised_steps: int | None = None
    trained_on: str | None = None
    proprio: bool = True
    state_groups: tuple[str, ...] = ()
    action_groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.preset not in LIGHT_PRESETS and not _is_file(self.preset):
            raise ConfigError(
                f"no preset {self.preset!r}; there are {', '.join(LIGHT_PRESETS)}, or give the "
                f"JSON file of your own robot"
            )


# Released files by their names, in the Hub repository yuanty/fastwam.
RELEASES = {
    "libero_uncond_2cam224": ReleaseInfo(preset="libero", variant="fast", action_shift=5.0),
    "robotwin_uncond_3cam_384": ReleaseInfo(preset="robotwin", variant="fast", action_shift=5.0),
    "libero_optional_idm_2cam224": ReleaseInfo(
        preset="libero", variant="optional_idm", action_shift=1.0
    ),
}


def release_config(
    release: ReleaseInfo,
    sizes: FastWAMConfig | LightWAMConfig,
    *,
    state: Normalization | None,
    action: Normalization,
    dtype: DtypeName,
) -> PolicyConfig:
    """Return the configuration of a file of a reference implementation.

    Args:
        release: What the file does not record.
        sizes: Sizes of its model.
        state: Normalisation of the state; None for a model without proprioception.
        action: Normalisation of the actions.
        dtype: Dtype to compute in.

    Raises:
        ConfigError: The preset is not of this model's family.
    """
    family: Family = "fast_wam" if isinstance(sizes, FastWAMConfig) else "light_wam"
    preset = preset_of(family, release.preset)
    return PolicyConfig(
        family=family,
        variant=release.variant,
        model=sizes,
        cameras=preset.cameras,
        video=preset.video,
        state=None if state is None else StateConfig(names=preset.state_names, normalization=state),
        action=ActionConfig(
            layout=preset.layout,
            normalization=action,
            horizon=preset.horizon,
            replan=preset.replan,
            supervised_steps=release.supervised_steps,
            snap=preset.snap,
        ),
        prompt=preset.prompt,
        sampling=replace(preset.sampling, action_shift=release.action_shift),
        vae=Source(repo=preset.wan, subfolder="vae"),
        text=Source(repo=preset.wan),
        dtype=dtype,
        precision="reference",
        trained_on=release.trained_on,
    )


def preset_of(family: Family, name: str) -> Preset:
    """Return a preset of a family.

    Args:
        family: Model family.
        name: Name of the preset, or a JSON file that holds the fields of a `Preset`.

    Raises:
        ConfigError: The family has none of this name, or the file does not hold a preset.
    """
    if _is_file(name):
        return _read_preset(Path(name), family)
    presets = PRESETS if family == "fast_wam" else LIGHT_PRESETS
    if name not in presets:
        raise ConfigError(
            f"no preset {name!r} of the family {family!r}; there are {', '.join(presets)}"
        )
    return presets[name]


def _is_file(name: str) -> bool:
    """Return whether the name of a preset is that of a file."""
    return name.endswith(".json")


def _read_preset(path: Path, family: Family) -> Preset:
    """Read the preset of one's own robot."""
    cure = "write the fields of wam_policy.presets.Preset"
    data = documents.read_json_object(path, ConfigError, cure)
    if family == "light_wam":
        data = {"wan": LIGHT_WAN} | data
    try:
        return from_plain(Preset, data, "preset")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; {cure}") from error
