"""Quantized linear layers by torchao: smaller and, on hardware that multiplies them, faster; not the same function."""

from __future__ import annotations

import copy
from typing import Any, Literal, get_args

from torch import nn

from wam_policy.errors import ConfigError, MissingExtraError
from wam_policy.models.fast_wam.model import FastWAM
from wam_policy.models.layers.linear import Linear
from wam_policy.models.registry import Model

Quantization = Literal["int8", "int8_dynamic", "float8", "float8_dynamic"]
"""Weights only, or activations too, quantized anew at every call."""
MIN_QUANTIZED_WIDTH = 512  # narrower layers stay as they are: little to save, and they carry times, states and actions


def quantize_linears(model: Model, kind: Quantization) -> Model:
    """A copy of a model whose wide linear layers are quantized; the others share their weights with it.

    Raises:
        ConfigError: no such quantization, nothing to quantize.
        MissingExtraError: torchao isn't installed.
    """
    if kind not in get_args(Quantization):
        raise ConfigError(
            f"unknown quantization {kind!r}; there are {', '.join(get_args(Quantization))}"
        )
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
    if not any(map(_is_wide, model.modules())):
        raise ConfigError(
            f"no linear layer of this policy is {MIN_QUANTIZED_WIDTH} wide: there is nothing to quantize"
        )
    shared = {id(parameter): parameter for parameter in model.parameters()}
    small: Model = copy.deepcopy(model, shared)
    torchao.quantize_(small, configs[kind](), filter_fn=lambda layer, _: _is_wide(layer))
    return small.eval()


def _is_wide(layer: nn.Module) -> bool:
    return (
        isinstance(layer, Linear)
        and min(layer.in_features, layer.out_features) >= MIN_QUANTIZED_WIDTH
    )


def fuse_projections(model: FastWAM) -> FastWAM:
    """A twin that shares the model's memory: the parameters of both are parts of the twin's larger matrices.

    The model itself goes on as before: it can be trained, saved and moved.
    """
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    twin.video.fuse()
    twin.action.fuse()
    return twin.eval()
