"""Our bfloat16 results, rounded where the reference rounds, of the recorded models."""

import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F  # PyTorch's own name for it
from recorded import fast_wam, light_wam
from torch import Tensor

from wam_policy.models.layers import linear as layer
from wam_policy.models.layers.precision import REFERENCE

LIGHT = "lightwam/infer/action"
Model = tuple[dict[str, Tensor], dict[str, Any]]
"""A recorded model's tensors and configuration."""


def tensors(
    recorded: dict[str, Tensor], fast: Model, light: Model | None
) -> Iterator[tuple[str, Tensor]]:
    """Our value of each recorded tensor."""
    yield from fast_wam.schedules(recorded, torch.bfloat16)
    model, info = fast
    built = fast_wam.build(model, info, REFERENCE, torch.bfloat16)
    yield from (
        (name, x.float())
        for name, x in fast_wam.inference(built, model, info["steps"])
        if name in recorded
    )
    if light is not None:
        yield LIGHT, _light_actions(*light)


def _light_actions(model: dict[str, Tensor], info: dict[str, Any]) -> Tensor:
    built = light_wam.build(model, info, REFERENCE, torch.bfloat16)
    return light_wam.actions(built, model, torch.bfloat16, info["horizon"]).float()


def tolerance(recorded: Tensor, float32: Tensor | None) -> float:
    """Return 0 for a schedule, and for a chunk a fifth of the reference's distance to float32."""
    if float32 is None:
        return 0.0
    return float((recorded - float32).abs().max() / recorded.abs().max().clamp(min=1)) / 5


def light_tolerance(recorded: Tensor, light: Model) -> float:
    """Return the spread of our chunks over kernels and batch sizes, or `tolerance` if it is larger.

    No timestep is rounded in a Light-WAM, so float32 is only rounding noise away, about as far as
    two kernels are from each other: a fifth of that could only be met by the reference's kernels.
    """
    chunks = []
    for linear, attention in itertools.product(
        (F.linear, wide_linear), (F.scaled_dot_product_attention, wide_attention, plain)
    ):
        kernels = mock.patch.multiple(F, linear=linear, scaled_dot_product_attention=attention)
        with kernels, mock.patch.object(layer, "SLOW_BFLOAT16", False):
            chunks += [
                _light_actions(*light),
                torch.cat([_light_actions(one, light[1]) for one in _samples(light[0])]),
            ]
    spread = max(float((a - b).abs().max()) for a in chunks for b in chunks) / max(
        1.0, float(recorded.abs().max())
    )
    return max(spread, tolerance(recorded, light[0]["infer/action"]))


def _samples(model: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The recorded inputs one sample at a time."""
    size = len(model["in/latents"])
    return [
        {n: x[i : i + 1] if n.startswith("in/") else x for n, x in model.items()}
        for i in range(size)
    ]


_linear, _attention = F.linear, F.scaled_dot_product_attention


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer computed in float32, rounded once."""
    return _linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def wide_attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Attention computed in float32, rounded once."""
    return _attention(q.float(), k.float(), v.float(), *args, **kwargs).to(q.dtype)


def plain(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    """Attention without a mask in its three steps, each rounded."""
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v
