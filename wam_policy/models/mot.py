"""Mixture of transformers: the experts' tokens attend to each other, everything else stays with its expert.

Source: spec/fastwam.md sections 2.6 and 3.4. Tokens are ordered [video, action]; video never sees actions.
"""

# B batch, S tokens, D width, F latent frames, N tokens per frame, T actions in a chunk

from __future__ import annotations

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


def fast_mask(frames: int, tokens_per_frame: int, horizon: int, device: torch.device | None = None) -> Tensor:
    """Who attends to whom in Fast-WAM: bool [S, S], rows attend to columns, S = frames·tokens_per_frame + horizon.

    The first frame sees itself, later frames see all video, actions see the first frame and each other.
    """
    video = frames * tokens_per_frame
    mask = torch.zeros(video + horizon, video + horizon, dtype=torch.bool, device=device)
    mask[:, :tokens_per_frame] = True
    mask[tokens_per_frame:video, :video] = True
    mask[video:, video:] = True
    return mask


def joint_forward(video: Stream, action: Stream, mask: Tensor, *, read_video: bool) -> tuple[Tensor, Tensor]:
    """Run both experts side by side, with one attention over all tokens in each block.

    Args:
        video: the video expert's stream.
        action: the action expert's stream.
        mask: bool [S, S] over [video, action] tokens.
        read_video: False leaves out what only the video's own output needs: the rest of its last block.

    Returns:
        The last block's video tokens (those of the block before, if `read_video` is False) and action tokens.
    """
    x, y = video.tokens, action.tokens
    last = len(video.expert.blocks) - 1
    for i, (block_x, block_y) in enumerate(zip(video.expert.blocks, action.expert.blocks, strict=True)):
        mod_x, mod_y = block_x.modulations(video.time), block_y.modulations(action.time)
        query_x, kv_x = block_x.attention_inputs(x, mod_x, video.rope)
        query_y, kv_y = block_y.attention_inputs(y, mod_y, action.rope)
        attended = F.scaled_dot_product_attention(
            torch.cat((query_x, query_y), dim=2),
            torch.cat((kv_x.key, kv_y.key), dim=2),
            torch.cat((kv_x.value, kv_y.value), dim=2),
            attn_mask=mask,
        )
        attended_x, attended_y = attended.split((x.shape[1], y.shape[1]), dim=2)
        if read_video or i < last:
            x = block_x.finish(x, attended_x, mod_x, video.text[i])
        y = block_y.finish(y, attended_y, mod_y, action.text[i])
    return x, y


def prefill(video: Stream) -> list[KeyValue]:
    """Keys and values of the observed frame in every block: all that the actions ever read of the video."""
    x, cache = video.tokens, []
    last = len(video.expert.blocks) - 1
    for i, block in enumerate(video.expert.blocks):
        modulations = block.modulations(video.time)
        query, kv = block.attention_inputs(x, modulations, video.rope)
        cache.append(kv)
        if i < last:
            x = block.finish(x, F.scaled_dot_product_attention(query, *kv), modulations, video.text[i])
    return cache


def action_forward(action: Stream, cache: list[KeyValue]) -> Tensor:
    """Run the action expert alone, its tokens attending to the cached video and to each other; [B, T, D]."""
    x = action.tokens
    for block, text, seen in zip(action.expert.blocks, action.text, cache, strict=True):
        modulations = block.modulations(action.time)
        query, own = block.attention_inputs(x, modulations, action.rope)
        key, value = torch.cat((seen.key, own.key), dim=2), torch.cat((seen.value, own.value), dim=2)
        x = block.finish(x, F.scaled_dot_product_attention(query, key, value), modulations, text)
    return x
