"""Our bfloat16 results, rounded where the reference rounds, of the models recorded in the neighbouring files."""

from collections.abc import Iterator
from typing import Any

import torch
from recorded import fast_wam
from torch import Tensor

from wam_policy.models.layers import REFERENCE


def tensors(recorded: dict[str, Tensor], model: dict[str, Tensor], info: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Our value of each recorded tensor."""
    yield from fast_wam.schedules(recorded, torch.bfloat16)
    built = fast_wam.build(model, info, REFERENCE, torch.bfloat16)
    yield from ((name, x.float()) for name, x in fast_wam.inference(built, model, info["steps"]) if name in recorded)


def tolerance(recorded: Tensor, float32: Tensor | None) -> float:
    """Schedules are equal to the bit; chunks are five times closer to the reference's than float32 is."""
    if float32 is None:
        return 0.0
    return float((recorded - float32).abs().max() / recorded.abs().max().clamp(min=1)) / 5
