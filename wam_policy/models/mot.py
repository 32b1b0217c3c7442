"""Mixture of transformers: an expert's tokens attend to each other and to the keys and values of what it may see.

Video never sees actions (spec/fastwam.md section 2.6), so the video expert runs first and leaves its keys and values to the
action expert: no mask over all tokens is needed, and a pass that changes nothing is never repeated.
"""

# B batch, S tokens, N tokens of the observed frame, D width, H heads, d head width, G groups of tokens that share a timestep

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from wam_policy.models.layers import DiT, KeyValue, Rope


class Stream(NamedTuple):
    """One expert with its tokens and what conditions them."""

    expert: DiT
    tokens: Tensor  # [B, S, D]
    time: Tensor  # [B, G, 6, D]
    rope: Rope
    text: list[KeyValue]  # one pair per block


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
    for i, (block, text) in enumerate(zip(stream.expert.blocks[: last + 1], stream.text, strict=False)):
        modulations = block.modulations(stream.time)
        query, own = block.attention_inputs(x, modulations, stream.rope)
        cache.append(own)
        if read or i < last:
            attended = attend(query, own, None if seen is None else seen[i], first=first, mask=mask)
            x = block.finish(x, attended, modulations, text)
        if after is not None:
            x = after(i, x)
    return x, cache


def join(first: KeyValue, second: KeyValue) -> KeyValue:
    """Keys and values of two token sequences, one after the other."""
    return KeyValue(torch.cat((first.key, second.key), dim=2), torch.cat((first.value, second.value), dim=2))


def narrow(cache: list[KeyValue], tokens: int) -> list[KeyValue]:
    """Keys and values of the first so many tokens, in every block."""
    return [KeyValue(key.narrow(2, 0, tokens), value.narrow(2, 0, tokens)) for key, value in cache]
