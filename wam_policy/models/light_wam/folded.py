"""Light-WAM as acting needs it: LoRA merged, what no action depends on left out, everything constant folded into the weights.

Observed frames have timestep 0, so a block's modulations are constants; a linear layer after a norm takes its scale and shift,
one before a residual sum its gate. The folded model is the same function, rounded elsewhere.
Source: spec/lightwam.md section 7.3, items 1 to 3, 7 and 8.
"""

# B batch, C latent channels, h w latent grid, S tokens, D width, H heads, Q queries, M merged slots, T steps of a chunk

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812  # PyTorch's own name for it
from torch import Tensor, nn

from wam_policy.models.config import LightWAMConfig
from wam_policy.models.layers.attention import KeyValue, RMSNorm
from wam_policy.models.layers.linear import Linear
from wam_policy.models.layers.precision import Precision
from wam_policy.models.layers.rope import Rope, rotate, video_rope
from wam_policy.models.layers.transformer import Text, text_mlp
from wam_policy.models.layers.video_dit import embed_patches, token_grid


class LeanBlock(nn.Module):
    """A transformer block of plain norms: self-attention, text cross-attention, feed-forward."""

    def __init__(self, config: LightWAMConfig, precision: Precision) -> None:
        super().__init__()
        dim, inner = config.video_dim, config.heads * config.head_dim
        self.heads, self.eps = config.heads, config.eps
        self.qkv, self.o = Linear(dim, 3 * inner), Linear(inner, dim)
        self.cross_q, self.cross_kv, self.cross_o = (
            Linear(dim, inner),
            Linear(dim, 2 * inner),
            Linear(inner, dim),
        )
        self.norm_q, self.norm_k, self.cross_norm_q, self.cross_norm_k = (
            RMSNorm(inner, config.eps, fused=precision.fused_norm) for _ in range(4)
        )
        self.ffn = nn.Sequential(
            Linear(dim, config.video_ffn_dim),
            nn.GELU(approximate="tanh"),
            Linear(config.video_ffn_dim, dim),
        )

    def _norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def text_key_value(self, embedded: Tensor) -> KeyValue:
        """Keys and values of embedded text tokens [B, L, D]."""
        key, value = self.cross_kv(embedded).chunk(2, dim=-1)
        return KeyValue(self._split(self.cross_norm_k(key)), self._split(value))

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor, rope: Rope, text: KeyValue, bias: Tensor | None = None) -> Tensor:
        """Tokens [B, S, D] -> [B, S, D]; `bias` as in `Text`."""
        query, key, value = self.qkv(self._norm(x)).chunk(3, dim=-1)
        query, key = (
            rotate(self._split(norm(y)), rope)
            for norm, y in ((self.norm_q, query), (self.norm_k, key))
        )
        x = x + self.o(
            F.scaled_dot_product_attention(query, key, self._split(value))
            .transpose(1, 2)
            .flatten(2)
        )
        query = self._split(self.cross_norm_q(self.cross_q(self._norm(x))))
        x = x + self.cross_o(
            F.scaled_dot_product_attention(query, *text, attn_mask=bias).transpose(1, 2).flatten(2)
        )
        return x + self.ffn(self._norm(x))


class LeanVideo(nn.Module):
    """A video expert that only watches the observed frame."""

    def __init__(self, config: LightWAMConfig, precision: Precision) -> None:
        super().__init__()
        self.patch, self.head_dim, self.precision = config.patch_size, config.head_dim, precision
        self.patch_embedding = nn.Conv3d(
            config.latent_channels, config.video_dim, self.patch, self.patch
        )
        self.text_embedding = text_mlp(config.text_dim, config.video_dim)
        blocks = nn.ModuleList(LeanBlock(config, precision) for _ in range(config.layers))
        self.blocks = cast("Sequence[LeanBlock]", blocks)  # a module list, seen as what it holds

    def embed_text(self, context: Tensor) -> Text:
        """Raw context [B, L, text_dim] -> cross-attention keys and values."""
        embedded = self.text_embedding(context)
        return Text([block.text_key_value(embedded) for block in self.blocks])

    def rope(self, latents: Tensor) -> Rope:
        """Rotary tables of the tokens of latents [B, C, 1, h, w]."""
        return video_rope(
            token_grid(latents, self.patch), self.head_dim, latents.device, self.precision.rope
        )

    def run_blocks(
        self, latents: Tensor, rope: Rope, text: Text, after: Callable[[int, Tensor], Tensor]
    ) -> None:
        """Run the blocks over latents [B, C, 1, h, w]; `after` replaces the tokens after each block, given its number."""
        x = embed_patches(self.patch_embedding, latents)
        for i, (block, key_value) in enumerate(zip(self.blocks, text.layers, strict=True)):
            x = after(i, block(x, rope, key_value, text.bias))


class LeanPooler(nn.Module):
    """A query pooler whose queries are constants: one map of scores, and one weighted mean of the tokens per head and slot.

    The merge over queries commutes with the value and output projections, and what is the same for all tokens doesn't change a
    softmax, so the query and key projections become one matrix of scores.
    """

    def __init__(self, config: LightWAMConfig) -> None:
        super().__init__()
        dim, slots = config.video_dim, 1 if config.merge_dim is None else config.merge_slots
        self.heads = config.pool_heads
        self.scores = Linear(dim, self.heads * config.queries, bias=False)
        self.merge = nn.Parameter(torch.ones(slots, config.queries) / config.queries)
        self.value, self.out = Linear(dim, dim), Linear(dim, dim)
        self.query_merge_projector = merge_projector(config)
        self.output_norm = nn.LayerNorm(config.merge_dim or dim)

    def merge_weights(self) -> Tensor:
        """How much each query's answer counts in each merged slot, [M, Q]; rows sum to 1."""
        return self.merge

    def attention(self, tokens: Tensor) -> Tensor:
        """What each query looks at: tokens [B, S, D] -> [B, H, Q, S]; rows sum to 1."""
        return self._attention(F.layer_norm(tokens, tokens.shape[-1:]))

    def _attention(self, normed: Tensor) -> Tensor:
        return self.scores(normed).unflatten(-1, (self.heads, -1)).permute(0, 2, 3, 1).softmax(-1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, S, D] -> one vector [B, merge_dim or D]."""
        normed = F.layer_norm(tokens, tokens.shape[-1:])
        means = (self.merge @ self._attention(normed)) @ normed.unsqueeze(
            1
        )  # [B, H, M, D], one per head and slot
        value = self.value.weight.unflatten(0, (self.heads, -1))
        answers = means @ value.transpose(1, 2) + self.value.bias.unflatten(0, (self.heads, 1, -1))
        merged = self.out(answers.transpose(1, 2).flatten(2)).flatten(1)
        return self.output_norm(
            merged if self.query_merge_projector is None else self.query_merge_projector(merged)
        )


def merge_projector(config: LightWAMConfig) -> nn.Sequential | None:
    """What makes one vector out of several merged slots; None: there is one slot only."""
    if config.merge_dim is None:
        return None
    width = config.merge_slots * config.video_dim
    return nn.Sequential(nn.LayerNorm(width), Linear(width, config.merge_dim))
