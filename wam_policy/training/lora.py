"""LoRA for a Fast-WAM, through peft: adapters on every linear layer of its blocks.

The adapters are merged into the weights of the exported policy. A Light-WAM has LoRA layers of its
own (`models.layers.lora`), which are a part of its architecture.
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
NAME = "default"  # of the only adapter, in peft's dictionaries


def attach_adapters(model: nn.Module, *, rank: int, alpha: float) -> None:
    """Add LoRA adapters to a model, and train only them and the robot's own layers.

    Args:
        model: A Fast-WAM; changed.
        rank: Rank of the adapters.
        alpha: Their scale, divided by the rank.

    Raises:
        MissingExtraError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingExtraError("peft", "train") from error

    # peft freezes everything but its adapters.
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS)
    inject_adapter_in_model(config, model, NAME)
    for name, parameter in model.named_parameters():
        if name.startswith(EMBODIMENT_LAYERS):
            parameter.requires_grad_(True)


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a model by name, with its adapters merged into the layers.

    The model may have no adapters. If it is sharded, every process must iterate.
    """
    # Layers of peft, which wrap the layers of the model.
    adapted: dict[str, Any] = {}
    for path, module in model.named_modules():
        if hasattr(module, "lora_A"):
            adapted[path] = module

    for path, layer in adapted.items():
        up = full_tensor(layer.lora_B[NAME].weight)
        down = full_tensor(layer.lora_A[NAME].weight)
        weight = full_tensor(layer.base_layer.weight)
        yield f"{path}.weight", weight + layer.scaling[NAME] * (up @ down)
        yield f"{path}.bias", full_tensor(layer.base_layer.bias)

    # All other weights are those of the plain model.
    prefixes = tuple(f"{path}." for path in adapted)
    for name, parameter in model.named_parameters():
        if not name.startswith(prefixes):
            yield name, full_tensor(parameter)


@torch.no_grad()
def copy_merged(model: nn.Module, plain: nn.Module) -> None:
    """Copy the weights of a model, adapters merged, into the same model without adapters.

    Args:
        model: Model to copy from; it may be sharded, then every process must call this.
        plain: Model to copy to; changed.
    """
    # Both models name their weights alike once the adapters are merged.
    parameters = dict(plain.named_parameters())
    for name, x in merged_weights(model):
        parameters[name].copy_(x)
