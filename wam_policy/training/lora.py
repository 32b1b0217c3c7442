"""LoRA for a Fast-WAM, through peft: every linear layer of its blocks gets a low-rank addition, merged when it is kept.

A Light-WAM has its own (`models.lora`), which is a part of its architecture.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from wam_policy.errors import MissingExtraError
from wam_policy.training.distributed import full_tensor
from wam_policy.training.initialization import EMBODIMENT_LAYERS

TARGETS = r"(video|action)\.blocks\.\d+\.((self_attn|cross_attn)\.[qkvo]|ffn\.[02])"
NAME = "default"  # peft's, of the only adapter there is


def attach_adapters(model: nn.Module, *, rank: int, alpha: float) -> None:
    """Put adapters beside the layers of a model's blocks, and train nothing but them and the robot's own layers.

    Raises:
        MissingExtraError: peft isn't installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingExtraError("peft", "train") from error
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS), model, NAME
    )
    for name, parameter in model.named_parameters():
        if name.startswith(EMBODIMENT_LAYERS):
            parameter.requires_grad_(True)


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of the plain model that a model with adapters equals, by name; where they are cut, every process must ask."""
    adapted: dict[str, Any] = {
        path: layer for path, layer in model.named_modules() if hasattr(layer, "lora_A")
    }
    for path, layer in adapted.items():
        up, down = full_tensor(layer.lora_B[NAME].weight), full_tensor(layer.lora_A[NAME].weight)
        yield (
            f"{path}.weight",
            full_tensor(layer.base_layer.weight) + layer.scaling[NAME] * (up @ down),
        )
        yield f"{path}.bias", full_tensor(layer.base_layer.bias)
    inside = tuple(f"{path}." for path in adapted)
    yield from (
        (name, full_tensor(x))
        for name, x in model.named_parameters()
        if not name.startswith(inside)
    )


@torch.no_grad()
def copy_merged(model: nn.Module, plain: nn.Module) -> None:
    """Give a plain model the weights that another equals."""
    places = dict(plain.named_parameters())
    for name, x in merged_weights(model):
        places[name].copy_(x)
