"""Transformed weights for inference: quantized linear layers and fused projections."""

from __future__ import annotations

import copy
from typing import Any, Literal, TypeVar, get_args

from torch import nn

from wam_policy.errors import ConfigError, MissingExtraError
from wam_policy.models.fast_wam.model import FastWAM
from wam_policy.models.layers.linear import Linear
from wam_policy.models.registry import Model

Quantization = Literal["int8", "int8_dynamic", "float8", "float8_dynamic"]
"""Quantized weights or, in the dynamic forms, also activations, scaled anew in every call."""

# Narrower layers are not quantized: they save little, and they carry timesteps, states and actions,
# which are sensitive to rounding.
MIN_QUANTIZED_WIDTH = 512

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def copy_sharing_parameters(model: ModuleT) -> ModuleT:
    """Return a copy of a model whose modules are new and whose parameters are the model's own."""
    # `deepcopy` returns what its memo holds for an object's id instead of copying the object.
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, memo)


def quantize_linears(model: Model, kind: Quantization) -> Model:
    """Return a copy of a model whose wide linear layers are quantized by torchao.

    Quantized layers are smaller and, on hardware that multiplies such numbers natively, faster, but
    their outputs differ. All other layers share their weights with the model.

    Raises:
        ConfigError: The quantization is unknown, or no layer is wide enough.
        MissingExtraError: torchao is not installed.
    """
    if kind not in get_args(Quantization):
        supported = ", ".join(get_args(Quantization))
        raise ConfigError(f"unknown quantization {kind!r}; choose one of {supported}")
    try:
        from torchao import quantization as torchao
    except ImportError as error:
        raise MissingExtraError("torchao", "quantize") from error
    configs: dict[str, Any] = {
        "int8": torchao.Int8WeightOnlyConfig,
        "int8_dynamic": torchao.Int8DynamicActivationInt8WeightConfig,
        "float8": torchao.Float8WeightOnlyConfig,
        "float8_dynamic": torchao.Float8DynamicActivationFloat8WeightConfig,
    }

    if not any(_is_wide_linear(module) for module in model.modules()):
        raise ConfigError(
            f"there is nothing to quantize: no linear layer of this policy is at least "
            f"{MIN_QUANTIZED_WIDTH} wide; compile without `quantize`"
        )
    quantized = copy_sharing_parameters(model)
    torchao.quantize_(
        quantized, configs[kind](), filter_fn=lambda module, _: _is_wide_linear(module)
    )
    return quantized.eval()


def _is_wide_linear(module: nn.Module) -> bool:
    if not isinstance(module, Linear):
        return False
    return min(module.in_features, module.out_features) >= MIN_QUANTIZED_WIDTH


def fuse_projections(model: FastWAM) -> FastWAM:
    """Return a copy of a model that computes projections of the same input as one product.

    The copy shares the model's memory: the parameters of both become slices of the larger
    matrices of the copy. The model can still be trained, saved and moved.
    """
    fused = copy_sharing_parameters(model)
    fused.video.fuse()
    fused.action.fuse()
    return fused.eval()
