"""Mixture of transformers: an expert's tokens attend to each other and to the keys and values of what it may see.

Video never sees actions (spec/fastwam.md section 2.6), so the video expert runs first and leaves its keys and values to the
action expert: no mask over all tokens is needed, and a pass that changes nothing is never repeated.
"""

# B batch, S tokens, N tokens of the observed frame, D width, H heads, d head width, G groups of tokens that share a timestep

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wam_policy.models.layers.attention import KeyValue
from wam_policy.models.layers.rope import Rope
from wam_policy.models.layers.transformer import Block, DiT, Shared, SharedText, Text


class Stream(NamedTuple):
    """One expert with its tokens and what conditions them."""

    expert: DiT
    tokens: Tensor  # [B, S, D]
    modulations: Sequence[Tensor | Shared]  # [B or 1, G, 6, D] per block
    rope: Rope
    text: Text | SharedText


def run(
    stream: Stream,
    seen: Sequence[Sequence[KeyValue]] = (),
    *,
    first: int = 0,
    mask: Tensor | None = None,
    read: bool = True,
    keep: bool = True,
    after: Callable[[int, Tensor], Tensor] | None = None,
    blocks: int | None = None,
) -> tuple[Tensor, list[KeyValue]]:
    """Run one expert's blocks over its tokens.

    Args:
        stream: the expert and its tokens.
        seen: what they attend to besides each other: for each other sequence, one pair per block.
        first: see `layers.attend`.
        mask: see `layers.attend`.
        read: False leaves out what only the tokens' own output needs: the rest of the last block.
        keep: False leaves out the keys and values.
        after: what replaces the tokens after each block, given the block's number.
        blocks: how many blocks to run; None: all.

    Returns:
        The last block's tokens [B, S, D] (those of the block before, if `read` is False), and every block's keys and values
        (none, if `keep` is False).
    """
    x, cache, text = stream.tokens, [], stream.text
    last = (len(stream.expert.blocks) if blocks is None else blocks) - 1
    for i in range(last + 1):
        block, modulation = stream.expert.blocks[i], stream.modulations[i]
        if read or i < last:
            sees = tuple(sequence[i] for sequence in seen)
            x, own = _through(block, x, modulation, stream.rope, text.layers[i], text.bias, sees, first, mask, keep)
        else:
            own = block.keys(x, modulation, stream.rope)
        if own is not None:
            cache.append(own)
        if after is not None:
            x = after(i, x)
    return x, cache


# Compiled once, not once for every block. In PyTorch 2.13 such a region may write into none of its inputs (the order of writes
# is lost) and return no views (their offset is lost); two are one only if their inputs are laid out alike, offsets included.
@torch.compiler.nested_compile_region
def _through(block: Block, *arguments: Any) -> tuple[Tensor, KeyValue | None]:
    """A block's `through`."""
    result: tuple[Tensor, KeyValue | None] = block(*arguments)
    return result


def write(part: KeyValue, buffer: KeyValue, start: int = 0) -> None:
    """Write the keys and values of tokens [B, H, S, d] into those of more, from `start` on."""
    for new, whole in zip(part, buffer, strict=True):
        copy_into(whole.narrow(2, start, new.shape[2]), new)


def copy_into(place: Tensor, new: Tensor) -> None:
    """`place.copy_(new)`, which in a build without CUDA refuses fake CUDA tensors: the code is checked there too."""
    torch.ops.aten.copy_.default(place, new)


def narrow(cache: list[KeyValue], tokens: int) -> list[KeyValue]:
    """Keys and values of the first so many tokens, in every block."""
    return [KeyValue(key.narrow(2, 0, tokens), value.narrow(2, 0, tokens)) for key, value in cache]
