"""`wam infer`: one chunk of actions for images, a state and an instruction, as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wam_policy.checkpoints import resolve_checkpoint
from wam_policy.errors import ObservationError
from wam_policy.observation import IMAGE, INSTRUCTION, STATE
from wam_policy.policy import WAMPolicy
from wam_policy.utils.pictures import read_picture


@dataclass(frozen=True, kw_only=True)
class InferConfig:
    """Prediction of one chunk by a checkpoint."""

    instruction: str
    """Instruction in words, such as "open the drawer"."""
    images: dict[str, Path]
    """Name of the camera and image file, for each camera of the policy."""
    state: tuple[float, ...] = ()
    """Values of the robot's state, in the policy's order."""
    checkpoint: str = "embedded:metaworld-fast-wam"
    """Folder, file of a known release, Hub id, or "embedded:<name>"."""
    compile: bool = False
    """Compile the policy first; compiling takes longer than a single prediction."""
    device: str = "cpu"
    """PyTorch device that the policy runs on."""


def infer(config: InferConfig) -> dict[str, Any]:
    """Predict one chunk and print it as JSON.

    Returns:
        The names of the numbers of an action ("names") and the actions [T, A] ("actions").

    Raises:
        ObservationError: An image cannot be read, or the observation does not fit the policy.
    """
    checkpoint = resolve_checkpoint(config.checkpoint)
    policy = WAMPolicy.from_pretrained(checkpoint, device=config.device)
    if config.compile:
        policy = policy.compile(batch_sizes=(1,))

    # One observation, as `predict_chunk` takes it.
    observation: dict[str, Any] = {
        STATE: np.array(config.state, np.float32),
        INSTRUCTION: config.instruction,
    }
    for name, path in config.images.items():
        observation[IMAGE + name] = read_picture(path, path, ObservationError)

    # The prediction, in the units of the training data.
    names = list(policy.config.action.layout.names)
    actions = policy.predict_chunk(observation).tolist()
    answer = {"names": names, "actions": actions}
    print(json.dumps(answer))
    return answer
