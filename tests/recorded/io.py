"""Our value of what the references feed their models and send to the simulators, by the presets."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from wam_policy import images
from wam_policy.contract import ActionLayout, Gripper
from wam_policy.hub import statistics
from wam_policy.presets import PRESETS
from wam_policy.wrappers.action import ActionMap
from wam_policy.wrappers.pose import axis_angle

CAMERAS = {
    "libero": ("agentview_image", "robot0_eye_in_hand_image"),
    "robotwin": ("head_camera", "left_camera", "right_camera"),
}


def tensors(recorded: dict[str, Tensor], path: Path) -> Iterator[tuple[str, Tensor]]:
    """Our value of each recorded tensor; the statistics stand beside the file."""
    for robot, cameras in CAMERAS.items():
        preset = PRESETS[robot]
        seen = {name: recorded[f"{robot}/obs/{name}"].numpy() for name in cameras}
        if robot == "libero":  # its simulator's pictures are upside down
            seen = {name: picture[::-1, ::-1] for name, picture in seen.items()}
        pictures = {ours: seen[theirs][None] for ours, theirs in zip(preset.cameras.names, cameras, strict=True)}
        yield f"{robot}/model/image", torch.from_numpy(images.canvas(pictures, preset.cameras))

        def stats(vector: str, dim: int, robot: str = robot) -> statistics.Normalization:
            file = path.with_name(f"{path.stem}_{robot}_stats.json")
            return statistics.read(file, vector, PRESETS[robot].normalization, dim)

        if robot == "libero":
            state = np.concatenate(
                [
                    recorded["libero/obs/robot0_eef_pos"].numpy(),
                    axis_angle(recorded["libero/obs/robot0_eef_quat"].numpy()),
                    recorded["libero/obs/robot0_gripper_qpos"].numpy(),
                ]
            )
        else:
            state = recorded["robotwin/obs/joint_action_vector"].numpy()
        proprio = stats("state", len(preset.state_names)).normalize(state.astype(np.float32)[None])
        yield f"{robot}/model/proprio", torch.from_numpy(proprio)

        action = stats("action", preset.layout.dim).denormalize(recorded[f"{robot}/model/action"].numpy())
        if robot == "robotwin":
            yield "robotwin/env_action", torch.from_numpy(action)
            continue
        yield "libero/denormalised_action", torch.from_numpy(action)
        for name, binary in (("env_action_continuous", False), ("env_action", True)):
            yield f"libero/{name}", torch.from_numpy(_libero_map(binary)(action))


def _libero_map(binary: bool) -> ActionMap:
    """From the checkpoint's actions to LIBERO's, where -1 opens the gripper and 1 closes it."""
    layout = PRESETS["libero"].layout
    source = ActionLayout(names=layout.names, control=layout.control, gripper=Gripper(index=6, open=1, closed=0, binary=binary))
    target = ActionLayout(names=layout.names, control=layout.control, gripper=Gripper(index=6, open=-1, closed=1))
    return ActionMap(source, target, spaces.Box(-np.inf, np.inf, (layout.dim,), np.float32))
