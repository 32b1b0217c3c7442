"""`wam infer`: one chunk of actions for pictures, a state and an instruction, as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from wam_policy.checkpoints import resolve_checkpoint
from wam_policy.errors import ObservationError
from wam_policy.policy import WAMPolicy


@dataclass(frozen=True, kw_only=True)
class InferConfig:
    """One question to a checkpoint."""

    instruction: str
    images: dict[str, Path]
    """Camera and picture file, for each camera of the policy."""
    state: tuple[float, ...] = ()
    """The numbers of the state, in the policy's order."""
    checkpoint: str = "embedded:metaworld-fast-wam"
    """Folder, file of a known release, Hub id, or "embedded:<name>"."""
    compile: bool = False
    """Compile the policy first; worth it for more than one question only."""
    device: str = "cpu"


def infer(config: InferConfig) -> dict[str, Any]:
    """Ask, print the answer, and return it."""
    policy = WAMPolicy.from_pretrained(resolve_checkpoint(config.checkpoint), device=config.device)
    if config.compile:
        policy = policy.compile(batch_sizes=(1,))
    observation: dict[str, Any] = {
        f"images.{name}": _picture(path) for name, path in config.images.items()
    }
    observation |= {"state": np.array(config.state, np.float32), "instruction": config.instruction}
    layout = policy.config.action.layout
    answer = {"names": list(layout.names), "actions": policy.predict_chunk(observation).tolist()}
    print(json.dumps(answer))
    return answer


def _picture(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except OSError as error:
        raise ObservationError(f"{path} isn't a picture that can be read: {error}") from error
