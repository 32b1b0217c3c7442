"""The rows past a prompt's end as a few keys that count for all of them: equal rows make equal keys.

Source: spec/fastwam.md section 7.3, items 4 and 5.
"""

# N prompts, L rows of a padded prompt, K slots, D width

from __future__ import annotations

import math

import torch
from torch import Tensor

SLOT_ALIGNMENT = 8  # slots are a multiple of this, as CUDA's attention kernels want a bias to be
MIN_PADDING_SLOTS = (
    3  # slots that padding is given at least: so many biases in bfloat16 add up to a count
)


def slots_for(tokens: int, token_length: int, *, proprio: bool) -> int:
    """Slots that hold prompts of up to `tokens` tokens, padded to `token_length`."""
    wanted = min(tokens + MIN_PADDING_SLOTS, token_length) + proprio
    return -(-wanted // SLOT_ALIGNMENT) * SLOT_ALIGNMENT


def padding_biases(copies: int, slots: int, dtype: torch.dtype) -> list[float]:
    """Biases of `slots` equal keys that together count as `copies` of them.

    One bias ln(copies) would be enough if it were not rounded: in bfloat16 it would be off by up to 1.6 %. So each slot takes
    what fits, and the next one what is left. −inf: the slot isn't needed.
    """
    if copies <= slots:
        return [0.0] * copies + [-math.inf] * (slots - copies)
    biases, left = [], float(copies)
    for _ in range(slots):
        bias = _rounded_down(math.log(left), dtype) if left > 0 else -math.inf
        biases.append(bias)
        left -= math.exp(bias)
    return biases


def _rounded_down(x: float, dtype: torch.dtype) -> float:
    nearest = torch.tensor(x, dtype=dtype)
    if nearest.double() > x:
        nearest = torch.nextafter(nearest, torch.tensor(-math.inf, dtype=dtype))
    return float(nearest)


def condense_padding(
    context: Tensor, *, proprio: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Padded prompts with only as much padding as it takes to count for all of it.

    Args:
        context: [N, L, D], zero past each prompt's end.
        proprio: whether a proprio token will follow.
        dtype: what attention is computed in.

    Returns:
        [N, K, D] and the biases of these keys, [N, K]; the context itself and None where that is no shorter.
    """
    length = context.shape[1]
    used = (context != 0).any(2)
    tokens = [int(row.nonzero().max()) + 1 if row.any() else 0 for row in used]
    slots = slots_for(max(tokens), length, proprio=proprio) - proprio
    if slots >= length:
        return context, None
    biases = [[0.0] * n + padding_biases(length - n, slots - n, dtype) for n in tokens]
    return context[:, :slots].contiguous(), torch.tensor(biases, dtype=dtype, device=context.device)
