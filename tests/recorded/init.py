"""Our value of every tensor of an action expert made from a recorded video expert."""

from collections.abc import Iterator
from typing import Any

import torch
from recorded.fast_wam import model_config, under
from torch import Tensor

from wam_policy.hub.foreign import key_mapping
from wam_policy.models.fast_wam.initialize import action_from_video
from wam_policy.models.fast_wam.model import FastWAM


def tensors(fast_wam: dict[str, Tensor], info: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Our value of each recorded tensor, from the file of the video expert."""
    with torch.device("meta"):
        action = FastWAM(model_config(info)).action.state_dict()
    video = under(key_mapping.to_native(under(fast_wam, "weights/")), "video.")
    made = {f"action.{name}": x for name, x in action_from_video(video, action).items()}
    for name, x in key_mapping.from_native(made).items():
        yield name.removeprefix("mot."), x
