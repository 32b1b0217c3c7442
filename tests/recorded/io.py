"""Our model inputs and simulator actions, by the presets and the contracts of the envs."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from gymnasium import spaces
from recorded.fast_wam import under
from torch import Tensor

from wam_policy import images
from wam_policy.hub import dataset_stats
from wam_policy.presets import ENVS, PRESETS
from wam_policy.wrappers.action import ActionMap
from wam_policy.wrappers.envs.libero_state import libero_state
from wam_policy.wrappers.observation_map import rotate_180


def tensors(recorded: dict[str, Tensor], path: Path) -> Iterator[tuple[str, Tensor]]:
    """Our value of each recorded tensor; the statistics stand beside the file."""
    for robot, env in ENVS.items():
        if f"{robot}/model/image" not in recorded:
            continue
        preset, seen = (
            PRESETS[robot],
            {name: x.numpy() for name, x in under(recorded, f"{robot}/obs/").items()},
        )
        pictures = {name: seen[place] for name, place in env.cameras.items()}
        pictures = {
            name: rotate_180(picture) if name in env.rotated_cameras else picture
            for name, picture in pictures.items()
        }
        canvas = images.canvas(
            {name: picture[None] for name, picture in pictures.items()}, preset.cameras
        )
        yield f"{robot}/model/image", torch.from_numpy(canvas)

        def stats(vector: str, dim: int, robot: str = robot) -> dataset_stats.Normalization:
            file = path.with_name(f"{path.stem}_{robot}_stats.json")
            return dataset_stats.read_normalization(file, vector, PRESETS[robot].normalization, dim)

        state = libero_state(seen) if robot == "libero" else seen["joint_action_vector"]
        proprio = stats("state", len(preset.state_names)).normalize(state.astype(np.float32)[None])
        yield f"{robot}/model/proprio", torch.from_numpy(proprio)

        action = stats("action", preset.layout.dim).denormalize(
            recorded[f"{robot}/model/action"].numpy()
        )
        if robot == "libero":
            yield "libero/denormalised_action", torch.from_numpy(action)
            yield (
                "libero/env_action_continuous",
                torch.from_numpy(_sent(robot, action, binary=False)),
            )
        yield f"{robot}/env_action", torch.from_numpy(_sent(robot, action, binary=True))


def _sent(robot: str, action: np.ndarray, *, binary: bool) -> np.ndarray:
    """Return what is sent to the simulator; `binary` False leaves gripper values continuous."""
    source, target = PRESETS[robot].layout, ENVS[robot].action
    if source.gripper is not None:
        source = replace(source, gripper=replace(source.gripper, binary=binary))
    return ActionMap(source, target, spaces.Box(-np.inf, np.inf, (source.dim,), np.float32))(action)
