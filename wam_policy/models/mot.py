"""Mixture of transformers: an expert's tokens attend to each other and to the keys and values of what it may see.

Video never sees actions (spec/fastwam.md section 2.6), so the video expert runs first and leaves its keys and values to the
action expert: no mask over all tokens is needed, and a pass that changes nothing is never repeated. `run` is differentiable and
returns keys and values; `fill` writes them into buffers.
"""

# B batch, S tokens, N tokens of the observed frame, D width, H heads, d head width, G groups of tokens that share a timestep

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from wam_policy.models.layers import Block, DiT, KeyValue, Rope, Text


class Stream(NamedTuple):
    """One expert with its tokens and what conditions them."""

    expert: DiT
    tokens: Tensor  # [B, S, D]
    modulations: Sequence[Tensor]  # [B or 1, G, 6, D] per block
    rope: Rope
    text: Text


def attend(query: Tensor, own: KeyValue, seen: KeyValue | None = None, *, first: int = 0, mask: Tensor | None = None) -> Tensor:
    """Attention of one expert's tokens, [B, H, S, d].

    Args:
        query: [B, H, S, d].
        own: keys and values of the same tokens.
        seen: keys and values of other tokens, which all of them see too.
        first: the first so many tokens see only each other (the observed frame of a clip).
        mask: bool [B, 1, 1, seen + S], False hides a key from a sample.
    """
    if first:
        key, value = (x.narrow(2, 0, first) for x in own)
        observing, later = query.split((first, query.shape[2] - first), dim=2)
        observed = F.scaled_dot_product_attention(observing, key, value)
        return torch.cat((observed, F.scaled_dot_product_attention(later, *own)), dim=2)
    key, value = own if seen is None else join(seen, own)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def run(
    stream: Stream,
    seen: list[KeyValue] | None = None,
    *,
    first: int = 0,
    mask: Tensor | None = None,
    read: bool = True,
    after: Callable[[int, Tensor], Tensor] | None = None,
    blocks: int | None = None,
) -> tuple[Tensor, list[KeyValue]]:
    """Run one expert's blocks over its tokens.

    Args:
        stream: the expert and its tokens.
        seen: what they attend to besides each other, one pair per block.
        first: see `attend`.
        mask: see `attend`.
        read: False leaves out what only the tokens' own output needs: the rest of the last block.
        after: what replaces the tokens after each block, given the block's number.
        blocks: how many blocks to run; None: all.

    Returns:
        The last block's tokens [B, S, D] (those of the block before, if `read` is False), and every block's keys and values.
    """
    x, cache = stream.tokens, []
    last = (len(stream.expert.blocks) if blocks is None else blocks) - 1
    for i, block in enumerate(stream.expert.blocks[: last + 1]):
        query, own = block.attention_inputs(x, stream.modulations[i], stream.rope)
        cache.append(own)
        if read or i < last:
            attended = attend(query, own, None if seen is None else seen[i], first=first, mask=mask)
            x = block.finish(x, attended, stream.modulations[i], stream.text.layers[i], stream.text.bias)
        if after is not None:
            x = after(i, x)
    return x, cache


def fill(stream: Stream, buffers: Sequence[KeyValue], start: int, *, read: bool = True) -> Tensor:
    """Run one expert's blocks over its tokens, which see each other and what stands before them in the buffers; for inference.

    Args:
        stream: the expert and its tokens.
        buffers: [B, H, N, d] per block; the tokens' keys and values are written to `start` … `start + S`.
        start: how many tokens they see besides each other.
        read: see `run`.

    Returns:
        The last block's tokens [B, S, D] (those of the block before, if `read` is False).
    """
    x, last = stream.tokens, len(stream.expert.blocks) - 1
    for i, block in enumerate(stream.expert.blocks):
        modulation, text, buffer = stream.modulations[i], stream.text, buffers[i]
        if read or i < last:
            x = _through(block, x, modulation, stream.rope, text.layers[i], text.bias, buffer, start)
        else:
            write(block.attention_inputs(x, modulation, stream.rope)[1], buffer, start)
    return x


@torch.compiler.nested_compile_region  # one block is compiled, not each of all steps
def _through(
    block: Block,
    x: Tensor,
    modulation: Tensor,
    rope: Rope,
    text: KeyValue,
    bias: Tensor | None,
    buffer: KeyValue,
    start: int,
) -> Tensor:
    query, own = block.attention_inputs(x, modulation, rope)
    write(own, buffer, start)
    seen = (whole.narrow(2, 0, start + x.shape[1]) for whole in buffer)
    return block.finish(x, F.scaled_dot_product_attention(query, *seen), modulation, text, bias)


def write(part: KeyValue, buffer: KeyValue, start: int) -> None:
    """Write the keys and values of tokens [B, H, S, d] into those of more, from `start` on."""
    for new, whole in zip(part, buffer, strict=True):
        copy_into(whole.narrow(2, start, new.shape[2]), new)


def copy_into(place: Tensor, new: Tensor) -> None:
    """`place.copy_(new)`, which in a build without CUDA refuses fake CUDA tensors: the code is checked there too."""
    torch.ops.aten.copy_.default(place, new)


def join(first: KeyValue, second: KeyValue) -> KeyValue:
    """Keys and values of two token sequences, one after the other."""
    return KeyValue(torch.cat((first.key, second.key), dim=2), torch.cat((first.value, second.value), dim=2))


def narrow(cache: list[KeyValue], tokens: int) -> list[KeyValue]:
    """Keys and values of the first so many tokens, in every block."""
    return [KeyValue(key.narrow(2, 0, tokens), value.narrow(2, 0, tokens)) for key, value in cache]
