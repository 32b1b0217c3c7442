"""What the released Fast-WAM checkpoints were trained and evaluated with, as data. Source: spec/fastwam.md section 5."""

from __future__ import annotations

from dataclasses import dataclass

from wam_policy.config import CameraConfig, PromptConfig, SamplingConfig, VideoConfig
from wam_policy.contract import ActionLayout, Gripper
from wam_policy.normalize import Mode

PROMPT = PromptConfig(
    template="A video recorded from a robot's point of view executing the following instruction: {task}", token_length=128
)
JOINTS = tuple(f"{side}_{name}" for side in ("left", "right") for name in (*(f"joint_{i}" for i in range(6)), "gripper"))


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


PRESETS = {
    "libero": Preset(
        cameras=CameraConfig(names=("image", "wrist_image"), height=224, width=224, resize="cover"),
        video=VideoConfig(frames=9, stride=4),
        state_names=("x", "y", "z", "axis_angle_x", "axis_angle_y", "axis_angle_z", "finger_left", "finger_right"),
        layout=ActionLayout(
            names=("delta_x", "delta_y", "delta_z", "delta_rotation_x", "delta_rotation_y", "delta_rotation_z", "gripper"),
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
            names=("cam_high", "cam_left_wrist", "cam_right_wrist"), height=128, width=160, resize="stretch", layout="t"
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
