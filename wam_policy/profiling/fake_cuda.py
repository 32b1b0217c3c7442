"""Runs the hot path of a contract on tensors that hold no numbers, on a device that isn't there: its memory and its kernels.

A fake tensor raises where devices are mixed or a value is asked for, so what passes never waits for the device.
"""

# B batch, T actions in a chunk, A numbers per action

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from wam_policy.config import PolicyConfig
from wam_policy.inference.bucket import EngineSpec, Options
from wam_policy.inference.engine import PROMPT_TOKENS, Engine
from wam_policy.inference.weight_transforms import fuse_projections
from wam_policy.models.config import LightWAMConfig
from wam_policy.models.encoders.text import PromptEmbeddings
from wam_policy.models.encoders.vae import build_vae
from wam_policy.models.fast_wam.model import FastWAM
from wam_policy.models.layers.precision import PRECISIONS
from wam_policy.models.layers.rope import action_rope, video_rope
from wam_policy.models.light_wam.fold import lean_config
from wam_policy.models.registry import build_model
from wam_policy.profiling.op_counter import Counts, count_operations
from wam_policy.utils.compiler import Compiler


class HotPath(NamedTuple):
    """What an inference costs."""

    text: Counts  # of a new prompt
    encode: Counts
    act: Counts
    weights: int  # bytes: the model's and those of the codec's encoder
    memory: int  # bytes of buckets, tables, one prompt, and what an observation leaves
    actions: tuple[tuple[int, ...], str]  # shape and device of the result

    @property
    def peak(self) -> int:
        """Bytes at the worst moment."""
        return self.weights + self.memory + max(self.text.peak, self.encode.peak, self.act.peak)


def fake_hot_path(
    config: PolicyConfig, codec: dict[str, Any], *, batch: int, device: str = "cuda"
) -> HotPath:
    """Build a policy's fast forms for the device, without numbers, and run them once.

    Args:
        config: the contract; a Light-WAM is taken lean.
        codec: diffusers' configuration of its codec.
        batch: B.
        device: of the fake tensors.
    """
    dtype, sizes = getattr(torch, config.dtype), config.model
    if isinstance(sizes, LightWAMConfig) and sizes.lean_steps is None:
        sizes = lean_config(sizes, config.action.horizon)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device("meta"):
            model = build_model(sizes, PRECISIONS[config.precision]).eval()
            vae = build_vae(codec)
            encoder = vae.first_frame_encoder
        shapes = [
            (module, {name: x.shape for name, x in module.state_dict().items()})
            for module in (model, encoder)
        ]
        with FakeTensorMode(), _Contiguous(), cuda_attention(), torch.no_grad():
            for module, sizes_of in shapes:
                empty = {
                    name: torch.empty(size, dtype=dtype, device=device)
                    for name, size in sizes_of.items()
                }
                module.load_state_dict(empty, assign=True)
            torch.set_default_dtype(before)
            known = {"": torch.zeros(PROMPT_TOKENS, sizes.text_dim, dtype=dtype)}
            prompts = PromptEmbeddings(
                known, token_length=config.prompt.token_length, text_dim=sizes.text_dim
            )
            options = Options(config.action_mode(), config.action.horizon, (batch,))
            frames = 1 + (config.video.frames - 1) // vae.temporal_ratio
            forward = EngineSpec(
                config,
                fuse_projections(model) if isinstance(model, FastWAM) else model,
                encoder,
                frames,
                options,
            )
            engine = Engine(forward, prompts, Compiler(None, "raise", torch.device(device)))
            size = _bytes([*model.parameters(), *encoder.parameters()])
            bucket = engine.bucket(batch)
            memory = _bytes(
                tree_leaves((bucket.buffers, bucket.texts, bucket.video_kv, bucket.constants))
            )
            states, actions, entries = [], [], []
            text = count_operations(lambda: entries.append(engine.text_cache.entries("")))
            encode = count_operations(lambda: states.append(bucket.encode()))
            act = count_operations(lambda: actions.append(bucket.act(states[0])))
            memory += _bytes(tree_leaves((entries, states)))
            return HotPath(
                text, encode, act, size, memory, (tuple(actions[0].shape), actions[0].device.type)
            )
    finally:
        torch.set_default_dtype(before)
        action_rope.cache_clear()  # they hold fake tables now
        video_rope.cache_clear()


class _Contiguous(TorchFunctionMode):
    """`x.contiguous()` as the operator: the method refuses fake CUDA tensors in a build without CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.contiguous:
            return torch.ops.aten.contiguous.default(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def cuda_attention() -> Iterator[None]:
    """Inside, attention of fake CUDA tensors takes a kernel that keeps no weights: only a build with CUDA would choose it."""
    if torch.backends.cuda.is_built():
        yield
        return
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("scaled_dot_product_attention", _efficient_attention, "AutogradCUDA")
        yield


def _efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(
                ~attn_mask, -torch.inf
            )
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    operator = torch.ops.aten._scaled_dot_product_efficient_attention
    attended: Tensor = operator(query, key, value, attn_mask, torch.is_grad_enabled())[0]
    return attended


def _bytes(tensors: list[object]) -> int:
    """Of the storages behind tensors, each counted once."""
    storages = {
        x.untyped_storage()._cdata: x.untyped_storage().nbytes()
        for x in tensors
        if isinstance(x, Tensor)
    }
    return sum(storages.values())
