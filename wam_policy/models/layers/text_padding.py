"""Condensing the padding of a prompt into a few keys with a bias that stands for all of its rows.

All padding rows of a prompt are zero, so they have the same key and value. n equal keys contribute
to a softmax exactly as one key whose score is raised by ln(n).
See docs/method.md, "Exact savings".
"""

# N prompts, L rows of a padded prompt, K slots, D width

from __future__ import annotations

import math

import torch
from torch import Tensor

SLOT_ALIGNMENT = 8  # CUDA attention kernels need a bias whose last axis is a multiple of this
# Minimum number of slots of padding: three biases in bfloat16 add up to the number of rows within
# 1e-5.
MIN_PADDING_SLOTS = 3


def num_text_slots(tokens: int, token_length: int, *, proprio: bool) -> int:
    """Return how many slots hold a prompt, its condensed padding and the proprioception token.

    Args:
        tokens: Tokens of the longest prompt.
        token_length: Rows that a prompt is padded to.
        proprio: Whether a proprioception token follows the prompt.

    Returns:
        A multiple of `SLOT_ALIGNMENT`.
    """
    required = min(tokens + MIN_PADDING_SLOTS, token_length) + proprio
    groups = math.ceil(required / SLOT_ALIGNMENT)
    return groups * SLOT_ALIGNMENT


def padding_biases(copies: int, slots: int, dtype: torch.dtype) -> list[float]:
    """Return the biases with which a few equal keys count as many.

    One bias of ln(copies) would suffice if it were not rounded: in bfloat16 it is off by up to
    1.6 %. So each slot rounds down, and the next one accounts for the remainder.

    Args:
        copies: Number of rows that the slots stand for.
        slots: Number of slots.
        dtype: Type that the biases will be rounded to.

    Returns:
        One bias per slot; −inf hides a slot that is not needed.
    """
    if copies <= slots:
        return [0.0] * copies + [-math.inf] * (slots - copies)

    biases = []
    remaining = float(copies)
    for _ in range(slots):
        bias = _round_down(math.log(remaining), dtype) if remaining > 0 else -math.inf
        biases.append(bias)
        remaining -= math.exp(bias)
    return biases


def _round_down(x: float, dtype: torch.dtype) -> float:
    """Return the largest number of a type that does not exceed `x`."""
    nearest = torch.tensor(x, dtype=dtype, device="cpu")
    if nearest.double() > x:
        minus_infinity = torch.tensor(-math.inf, dtype=dtype, device="cpu")
        nearest = torch.nextafter(nearest, minus_infinity)
    return float(nearest)


def condense_padding(
    context: Tensor,
    *,
    proprio: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Cut padded prompts to the rows that are needed to represent all of their padding.

    Args:
        context: [N, L, D] prompt embeddings, zero past each prompt's end.
        proprio: Whether a proprioception token will follow.
        dtype: Type that attention is computed in.

    Returns:
        Prompt embeddings [N, K, D] and the biases of their keys [N, K]; the context itself and
        None where that would not be shorter.
    """
    length = context.shape[1]

    # The length of each prompt: up to its last row that is not zero.
    used = (context != 0).any(2)
    lengths = []
    for row in used:
        last = int(row.nonzero().max()) if row.any() else -1
        lengths.append(last + 1)

    # The proprioception token takes a slot, but is appended later.
    slots = num_text_slots(max(lengths), length, proprio=proprio) - proprio
    if slots >= length:
        return context, None

    biases = []
    for tokens in lengths:
        padding = padding_biases(length - tokens, slots - tokens, dtype)
        biases.append([0.0] * tokens + padding)
    condensed = context[:, :slots].contiguous()
    bias = torch.tensor(biases, dtype=dtype, device=context.device)
    return condensed, bias
