"""The losses as the references compute them: one sequence, a dense mask, complex rotations, a time embedding for every token.

What the compiled training step is measured against, and equal to. Source: spec/fastwam.md sections 2 and 3, spec/lightwam.md
section 3.3.
"""

# B batch, S tokens, V tokens of the video, N of the observed frame, T actions in a chunk, D width

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # PyTorch's own name for it
from torch import Tensor

from wam_policy.models import flow_matching
from wam_policy.models.fast_wam.loss import (
    Batch,
    LossConfig,
    TrainingNoise,
    noise_clip,
    squared_error,
    weighted_mean,
)
from wam_policy.models.fast_wam.model import FastWAM
from wam_policy.models.layers.attention import KeyValue
from wam_policy.models.layers.rope import action_rope
from wam_policy.models.layers.transformer import Block, DiT, modulate
from wam_policy.models.layers.video_dit import VideoDiT, embed_patches, token_grid
from wam_policy.models.light_wam.loss import LightLossConfig, LightTrainingNoise
from wam_policy.models.light_wam.model import LightWAM, pool_latents


class Tokens(NamedTuple):
    """One expert's part of the sequence."""

    expert: DiT
    x: Tensor  # [B, S, D]
    time: Tensor  # [B, S, 6, D]
    rope: Tensor  # complex [S, d / 2]
    text: Sequence[KeyValue]
    text_mask: Tensor  # bool [B, 1, S, L]


def _turned(x: Tensor, table: Tensor) -> Tensor:
    turned = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous()) * table
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def _mask(video: int, first: int, actions: int) -> Tensor:
    """Who sees whom: the observed frame itself, later frames the whole video, actions the observed frame and each other."""
    mask = torch.zeros(video + actions, video + actions, dtype=torch.bool)
    mask[:first, :first] = mask[first:video, :video] = True
    mask[video:, :first] = mask[video:, video:] = True
    return mask


def _inputs(block: Block, tokens: Tokens) -> tuple[Tensor, KeyValue, Tensor]:
    modulation = block.modulation + tokens.time
    shift, scale = modulation.unbind(2)[:2]
    normed = F.layer_norm(tokens.x, tokens.x.shape[-1:], eps=block.eps)
    query, (key, value) = block.self_attn.query_key_value(modulate(normed, shift, scale))
    return _turned(query, tokens.rope), KeyValue(_turned(key, tokens.rope), value), modulation


def _layer(streams: Sequence[Tokens], i: int, mask: Tensor) -> list[Tokens]:
    """All experts' i-th blocks, whose tokens attend to each other as the mask [S, S] says."""
    inputs = [_inputs(tokens.expert.blocks[i], tokens) for tokens in streams]
    query = torch.cat([query for query, _, _ in inputs], dim=2)
    key, value = (
        torch.cat(parts, dim=2) for parts in zip(*(own for _, own, _ in inputs), strict=True)
    )
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    parts = attended.split([tokens.x.shape[1] for tokens in streams], dim=2)
    return [
        tokens._replace(
            x=tokens.expert.blocks[i].finish_block(
                tokens.x, part, modulation, tokens.text[i], tokens.text_mask
            )
        )
        for tokens, part, (_, _, modulation) in zip(streams, parts, inputs, strict=True)
    ]


def _video(
    model: FastWAM | LightWAM, latents: Tensor, t: Tensor, context: Tensor
) -> tuple[Tokens, Tensor]:
    """Tokens of a clip and the embedding of each one's timestep."""
    video = model.video
    assert isinstance(video, VideoDiT)
    frames, rows, columns = video.grid(latents)
    times = torch.cat(
        (
            t.new_zeros(len(t), rows * columns),
            t.unsqueeze(1).expand(-1, (frames - 1) * rows * columns),
        ),
        dim=1,
    )
    time, rope, x = (
        video.embed_time(times),
        video.rope(latents),
        embed_patches(video.patch_embedding, latents),
    )
    mask = torch.ones(len(x), 1, x.shape[1], context.shape[1], dtype=torch.bool)
    table = torch.complex(rope.cos.double(), rope.sin.double())
    return Tokens(
        video, x, time.modulation, table, video.embed_text(context).layers, mask
    ), time.embedding


def plain_fast(model: FastWAM, batch: Batch, draws: TrainingNoise, config: LossConfig) -> Tensor:
    """The loss of the variant "fast"."""
    shift = config.action_shift or 5.0
    t_video = flow_matching.timesteps(draws.u_video, config.video_shift, batch.latents.dtype)
    t_action = flow_matching.timesteps(draws.u_action, shift, batch.action.dtype)
    context = model.context(batch.context, batch.proprio)
    clip = noise_clip(batch.latents, draws.noise_video, t_video)
    video, time = _video(model, clip, t_video, context)
    action = model.action.action_encoder(
        flow_matching.add_noise(batch.action, draws.noise_action, t_action)
    )
    rope = action_rope(action.shape[1], model.config.head_dim, action.device, model.precision.rope)
    actions = Tokens(
        model.action,
        action,
        model.action.embed_time(t_action.unsqueeze(1).expand(-1, action.shape[1])).modulation,
        torch.complex(rope.cos.double(), rope.sin.double()),
        model.action.embed_text(context).layers,
        torch.ones(len(action), 1, action.shape[1], context.shape[1], dtype=torch.bool),
    )
    grid = model.video.grid(clip)
    streams, mask = [video, actions], _mask(video.x.shape[1], grid[1] * grid[2], action.shape[1])
    for i in range(model.config.layers):
        streams = _layer(streams, i, mask)
    velocity = model.video.decode(streams[0].x, time, grid)
    target = flow_matching.velocity(batch.latents, draws.noise_video)
    error = squared_error(velocity[:, :, 1:], target[:, :, 1:]).mean((1, 3, 4))
    loss_video = weighted_mean(
        error, ~batch.latent_is_pad, flow_matching.loss_weight(t_video, config.video_shift)
    )
    error = squared_error(
        model.action.head(streams[1].x), flow_matching.velocity(batch.action, draws.noise_action)
    ).mean(2)
    loss_action = weighted_mean(
        error, ~batch.action_is_pad, flow_matching.loss_weight(t_action, shift)
    )
    return config.lambda_video * loss_video + config.lambda_action * loss_action


def plain_light(
    model: LightWAM, batch: Batch, draws: LightTrainingNoise, config: LightLossConfig
) -> Tensor:
    """A Light-WAM's loss: two passes through all blocks, each with a text of its own."""

    def through(
        latents: Tensor, t: Tensor, after: Callable[[int, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        tokens, time = _video(model, latents, t, model.context(batch.context, batch.proprio))
        _, rows, columns = token_grid(latents, model.config.patch_size)
        mask = _mask(tokens.x.shape[1], rows * columns, 0)
        for i in range(model.config.layers):
            (tokens,) = _layer([tokens], i, mask)
            tokens = tokens._replace(x=after(i, tokens.x))
        return tokens.x, time

    first = batch.latents[:, :, :1]
    taps, record = model.make_tap_recorder()
    through(first, draws.u_video.new_zeros(len(first)), record)
    horizon = batch.action.shape[1]
    actions = model.expert(taps, horizon)
    counts = ~batch.action_is_pad * config.step_weights(horizon, actions)
    action = (
        (squared_error(actions, batch.action).mean(2) * counts).sum(1)
        / counts.sum(1).clamp(min=1e-6)
    ).mean()
    clean = pool_latents(batch.latents, model.config.video_pool)
    t = flow_matching.timesteps(draws.u_video, config.video_shift, clean.dtype)
    clip = noise_clip(clean, draws.noise_video, t)
    assert isinstance(model.video, VideoDiT)
    velocity = model.video.decode(
        *through(clip, t, model.make_tap_recorder()[1]), model.video.grid(clip)
    )
    error = squared_error(
        velocity[:, :, 1:], flow_matching.velocity(clean, draws.noise_video)[:, :, 1:]
    ).mean((1, 3, 4))
    video = weighted_mean(
        error, ~batch.latent_is_pad, flow_matching.loss_weight(t, config.video_shift)
    )
    return config.lambda_video * video + config.lambda_action * action
