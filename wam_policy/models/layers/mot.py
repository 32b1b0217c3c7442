"""Mixture of transformers: an expert's tokens attend to each other and to the keys and values of what it may see.

Video never sees actions (spec/fastwam.md section 2.6), so the video expert runs first and leaves its keys and values to the
action expert: no mask over all tokens is needed, and a pass that changes nothing is never repeated.
"""

# B batch, S tokens, N tokens of the observed frame, D width, H heads, d head width, G groups of tokens that share a timestep

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wam_policy.models.layers.attention import KeyValue
from wam_policy.models.layers.rope import Rope
from wam_policy.models.layers.transformer import (
    Block,
    BlockInput,
    DiT,
    SharedInput,
    SharedText,
    Text,
)


class Stream(NamedTuple):
    """One expert with its tokens and what conditions them."""

    expert: DiT
    tokens: Tensor  # [B, S, D]
    modulations: Sequence[Tensor | SharedInput]  # [B or 1, G, 6, D] per block
    rope: Rope
    text: Text | SharedText


def run_blocks(
    stream: Stream,
    context_kv: Sequence[Sequence[KeyValue]] = (),
    *,
    num_observed_tokens: int = 0,
    mask: Tensor | None = None,
    need_output: bool = True,
    return_kv: bool = True,
    after_block: Callable[[int, Tensor], Tensor] | None = None,
    num_blocks: int | None = None,
) -> tuple[Tensor, list[KeyValue]]:
    """Run one expert's blocks over its tokens.

    Args:
        stream: the expert and its tokens.
        context_kv: what they attend to besides each other: for each other sequence, one pair per block.
        num_observed_tokens: see `layers.attend`.
        mask: see `layers.attend`.
        need_output: False leaves out what only the tokens' own output needs: the rest of the last block.
        return_kv: False leaves out the keys and values.
        after_block: what replaces the tokens after each block, given the block's number.
        num_blocks: how many blocks to run; None: all.

    Returns:
        The last block's tokens [B, S, D] (those of the block before, if `read` is False), and every block's keys and values
        (none, if `keep` is False).
    """
    x, cache, text = stream.tokens, [], stream.text
    last = (len(stream.expert.blocks) if num_blocks is None else num_blocks) - 1
    for i in range(last + 1):
        block, modulation = stream.expert.blocks[i], stream.modulations[i]
        if need_output or i < last:
            sees = tuple(sequence[i] for sequence in context_kv)
            inputs = BlockInput(
                tokens=x,
                modulation=modulation,
                rope=stream.rope,
                text=text.layers[i],
                text_bias=text.bias,
                context_kv=sees,
                num_observed_tokens=num_observed_tokens,
                mask=mask,
                return_kv=return_kv,
            )
            x, own = _block_region(block, inputs)
        else:
            own = block.self_key_value(x, modulation, stream.rope)
        if own is not None:
            cache.append(own)
        if after_block is not None:
            x = after_block(i, x)
    return x, cache


# Compiled once, not once for every block. In PyTorch 2.13 such a region may write into none of its inputs (the order of writes
# is lost) and return no views (their offset is lost); two are one only if their inputs are laid out alike, offsets included.
@torch.compiler.nested_compile_region
def _block_region(block: Block, inputs: BlockInput) -> tuple[Tensor, KeyValue | None]:
    """Run one block."""
    result: tuple[Tensor, KeyValue | None] = block(inputs)
    return result


def write_kv(part: KeyValue, buffer: KeyValue, start: int = 0) -> None:
    """Write the keys and values of tokens [B, H, S, d] into those of more, from `start` on."""
    for new, whole in zip(part, buffer, strict=True):
        copy_into(whole.narrow(2, start, new.shape[2]), new)


def copy_into(place: Tensor, new: Tensor) -> None:
    """`place.copy_(new)`, which in a build without CUDA refuses fake CUDA tensors: the code is checked there too."""
    torch.ops.aten.copy_.default(place, new)


def narrow_kv(cache: list[KeyValue], tokens: int) -> list[KeyValue]:
    """Keys and values of the first so many tokens, in every block."""
    return [KeyValue(key.narrow(2, 0, tokens), value.narrow(2, 0, tokens)) for key, value in cache]
