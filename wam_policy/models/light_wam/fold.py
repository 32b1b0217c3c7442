"""Folds a trained Light-WAM into the weights of its lean form: exact in real arithmetic, computed in at least float32.

Source: spec/lightwam.md section 7.3, items 1 to 3, 7 and 8.
"""

# D width, H heads, d head width, Q queries, M merged slots

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from wam_policy.models.config import LightWAMConfig
from wam_policy.models.layers.attention import Attention
from wam_policy.models.layers.lora import LoRALinear
from wam_policy.models.layers.rope import sinusoid
from wam_policy.models.layers.transformer import Block
from wam_policy.models.layers.video_dit import VideoDiT
from wam_policy.models.light_wam.action_head import QueryPooler
from wam_policy.models.light_wam.model import LightWAM

M = TypeVar("M", bound=nn.Module)
Affine = tuple[Tensor, Tensor]
"""Weight [out, in] and bias [out] of a linear layer."""


@torch.no_grad()
def fold_to_lean(model: LightWAM, steps: int) -> LightWAM:
    """The lean form of a model, in its dtype, for chunks of at most `steps` actions; unchanged tensors are shared."""
    assert isinstance(model.video, VideoDiT)
    config = lean_config(model.config, steps)
    with torch.device("meta"):
        small = LightWAM(config, model.precision)
    dtype, held = model.expert.fused_proj.weight.dtype, model.state_dict()
    folded = {name: x.to(dtype) for name, x in _folded(model, config.layers, steps)}
    kept = {
        name: x for name, x in held.items() if name in small.state_dict() and name not in folded
    }
    small.load_state_dict(kept | folded, assign=True)
    return small.eval()


def lean_config(config: LightWAMConfig, steps: int) -> LightWAMConfig:
    """The sizes of a model's lean form."""
    return replace(
        config, layers=config.taps[-1] + 1, lora_rank=0, lora_layers=None, lean_steps=steps
    )


def _folded(model: LightWAM, layers: int, steps: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors that the lean form has and the trained one hasn't, by name."""
    assert isinstance(model.video, VideoDiT)
    video, expert = model.video, model.expert
    dtype = torch.promote_types(expert.fused_proj.weight.dtype, torch.float32)
    device = expert.fused_proj.weight.device
    still = sinusoid(torch.zeros(1, 1, dtype=dtype, device=device), video.freq_dim)
    time = copy_at_least_float32(video.time_projection)(
        copy_at_least_float32(video.time_embedding)(still)
    ).unflatten(-1, (6, video.dim))
    for i, block in enumerate(video.blocks[:layers]):
        yield from ((f"video.blocks.{i}.{name}", x) for name, x in fold_block(block, time))
    for i, poolers in enumerate(expert.layer_poolers):
        assert isinstance(poolers, nn.ModuleDict)
        for source, pooler in poolers.items():
            assert isinstance(pooler, QueryPooler)
            yield from (
                (f"expert.layer_poolers.{i}.{source}.{name}", x) for name, x in fold_pooler(pooler)
            )
    places = sinusoid(torch.arange(steps, dtype=dtype, device=device), expert.step_dim)
    yield "expert.places", copy_at_least_float32(expert.step_pos_proj)(places)


def fold_block(block: Block, time: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A block whose modulations are the constants of one timestep, [1, 1, 6, D], as a `LeanBlock`."""
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (
        at_least_float32(x).flatten() for x in (block.modulation + time).unbind(2)
    )
    attention, cross = block.self_attn, block.cross_attn
    first, _, second = block.ffn
    qkv = [
        absorb_norm(merge_lora(layer), 1 + scale, shift)
        for layer in (attention.q, attention.k, attention.v)
    ]
    layers = {
        "qkv": stack_outputs(qkv),
        "o": scale_output(merge_lora(attention.o), gate),
        "cross_q": absorb_norm(
            merge_lora(cross.q),
            at_least_float32(block.norm3.weight),
            at_least_float32(block.norm3.bias),
        ),
        "cross_kv": stack_outputs([merge_lora(cross.k), merge_lora(cross.v)]),
        "cross_o": merge_lora(cross.o),
        "ffn.0": absorb_norm(merge_lora(first), 1 + ffn_scale, ffn_shift),
        "ffn.2": scale_output(merge_lora(second), ffn_gate),
    }
    for name, (weight, bias) in layers.items():
        yield f"{name}.weight", weight
        yield f"{name}.bias", bias
    yield from _norms(attention, "")
    yield from _norms(cross, "cross_")


def _norms(attention: Attention, prefix: str) -> Iterator[tuple[str, Tensor]]:
    yield f"{prefix}norm_q.weight", attention.norm_q.weight
    yield f"{prefix}norm_k.weight", attention.norm_k.weight


def fold_pooler(pooler: QueryPooler) -> Iterator[tuple[str, Tensor]]:
    """A pooler as a `LeanPooler`; `output_norm` and the merge projector stay as they are."""
    pooler = copy_at_least_float32(pooler)
    heads, norm = pooler.attn.num_heads, pooler.token_norm
    assert pooler.attn.in_proj_weight is not None and pooler.attn.in_proj_bias is not None
    query, key, value = zip(
        pooler.attn.in_proj_weight.chunk(3), pooler.attn.in_proj_bias.chunk(3), strict=True
    )
    asked = (pooler.query_tokens @ query[0].T + query[1]).unflatten(-1, (heads, -1))  # [Q, H, d]
    keys = key[0].unflatten(0, (heads, -1))  # [H, d, D]
    scores = (
        torch.einsum("qhd,hdi->hqi", asked, keys) / asked.shape[-1] ** 0.5
    )  # a bias is the same for all tokens
    yield "scores.weight", (scores * norm.weight).flatten(0, 1)
    yield "merge", pooler.merge_weights()
    weight, bias = absorb_norm(value, norm.weight, norm.bias)
    yield "value.weight", weight
    yield "value.bias", bias
    yield "out.weight", pooler.attn.out_proj.weight
    yield "out.bias", pooler.attn.out_proj.bias


def copy_at_least_float32(module: M) -> M:
    """A copy of a module in float32, or wider if it is."""
    return copy.deepcopy(module).to(
        torch.promote_types(next(module.parameters()).dtype, torch.float32)
    )


def at_least_float32(x: Tensor) -> Tensor:
    """In float32, or wider if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def merge_lora(layer: nn.Module) -> Affine:
    """A linear layer with its LoRA merged: `W + scale·Up·Down`."""
    assert isinstance(layer, nn.Linear)
    weight = at_least_float32(layer.weight)
    if isinstance(layer, LoRALinear):
        weight = weight + layer.scale * (
            at_least_float32(layer.lora_up.weight) @ at_least_float32(layer.lora_down.weight)
        )
    return weight, at_least_float32(layer.bias)


def absorb_norm(layer: Affine, scale: Tensor, shift: Tensor) -> Affine:
    """A layer that reads `x·scale + shift`, as one that reads x: `W·diag(scale)`, `b + W·shift`."""
    weight, bias = layer
    return weight * scale, bias + weight @ shift


def scale_output(layer: Affine, gate: Tensor) -> Affine:
    """A layer whose output is multiplied by `gate`."""
    return layer[0] * gate.unsqueeze(1), layer[1] * gate


def stack_outputs(layers: list[Affine]) -> Affine:
    """Layers of one input as one layer."""
    weights, biases = zip(*layers, strict=True)
    return torch.cat(weights), torch.cat(biases)
