"""Light-WAM's action head: the states of a few depths of the video expert, pooled and fused, give the whole chunk at once.

Source: spec/lightwam.md section 1.6. Parameter names are the reference checkpoints' own.
"""

# B batch, S tokens, D width, Q queries, M merged slots, T actions in a chunk, A numbers per action

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F  # noqa: N812  # PyTorch's own name for it
from torch import Tensor, nn

from wam_policy.errors import ConfigError
from wam_policy.models.config import LightWAMConfig
from wam_policy.models.layers.linear import Linear
from wam_policy.models.layers.rope import sinusoid
from wam_policy.models.light_wam.folded import LeanPooler, merge_projector

Taps = Sequence[Mapping[str, Tensor]]
"""Per tap the features that were recorded there, by source, each [B, S, D]."""


class QueryPooler(nn.Module):
    """Learned queries attend to a tap's tokens; their answers are merged into one vector."""

    query_merge_logits: nn.Parameter | None
    query_slot_merge_logits: nn.Parameter | None

    def __init__(self, config: LightWAMConfig) -> None:
        super().__init__()
        dim, queries = config.video_dim, config.queries
        self.token_norm = nn.LayerNorm(dim)
        self.query_tokens = nn.Parameter(0.02 * torch.randn(queries, dim))
        self.attn = nn.MultiheadAttention(
            dim, config.pool_heads, batch_first=True
        )  # its parameters; see `_project`
        one = config.merge_dim is None
        self.query_merge_logits = nn.Parameter(torch.zeros(queries)) if one else None
        self.query_slot_merge_logits = (
            None if one else nn.Parameter(torch.zeros(config.merge_slots, queries))
        )
        self.query_merge_projector = merge_projector(config)
        self.output_norm = nn.LayerNorm(config.merge_dim or dim)

    def merge_weights(self) -> Tensor:
        """How much each query's answer counts in each merged slot, [M, Q]; rows sum to 1."""
        if self.query_slot_merge_logits is not None:
            return self.query_slot_merge_logits.softmax(-1)
        assert self.query_merge_logits is not None
        return self.query_merge_logits.unsqueeze(0).softmax(-1)

    def _project(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, heads, Q, d], keys and values [B, heads, S, d] of tokens [B, S, D]."""
        normed = self.token_norm(tokens)
        queries = self.query_tokens.expand(len(tokens), -1, -1)
        assert self.attn.in_proj_weight is not None and self.attn.in_proj_bias is not None
        layers = zip(
            (queries, normed, normed),
            self.attn.in_proj_weight.chunk(3),
            self.attn.in_proj_bias.chunk(3),
            strict=True,
        )
        query, key, value = (
            F.linear(x, weight, bias).unflatten(-1, (self.attn.num_heads, -1)).transpose(1, 2)
            for x, weight, bias in layers
        )
        return query, key, value

    def attention(self, tokens: Tensor) -> Tensor:
        """What each query looks at: tokens [B, S, D] -> [B, heads, Q, S]; rows sum to 1."""
        query, key, _ = self._project(tokens)
        return (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, S, D] -> one vector [B, merge_dim or D]."""
        answers = self.attn.out_proj(
            F.scaled_dot_product_attention(*self._project(tokens)).transpose(1, 2).flatten(2)
        )
        merged = (self.merge_weights() @ answers).flatten(1)
        return self.output_norm(
            merged if self.query_merge_projector is None else self.query_merge_projector(merged)
        )


class MLP(nn.Module):
    """Norm and two linear layers."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1, self.fc2 = Linear(dim, out), Linear(out, out)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., out]."""
        return self.fc2(F.gelu(self.fc1(self.norm(x)), approximate="tanh"))


class StateFusionActionExpert(nn.Module):
    """Pools every tap, compresses and joins them, and reads one action per step of the chunk."""

    def __init__(self, config: LightWAMConfig) -> None:
        super().__init__()
        self.features, self.step_dim, self.lean_steps = (
            config.features,
            config.step_dim,
            config.lean_steps,
        )
        width, trunk = config.merge_dim or config.video_dim, config.trunk_dim
        learned, pooler = (
            config.pooling == "learned_query",
            QueryPooler if config.lean_steps is None else LeanPooler,
        )
        self.layer_poolers = nn.ModuleList(
            nn.ModuleDict({source: pooler(config) for source in sources if learned})
            for sources in config.features
        )
        self.layer_compressors = nn.ModuleList(
            MLP(width * len(sources), config.layer_dim) for sources in config.features
        )
        self.fused_norm = nn.LayerNorm(config.layer_dim * len(config.features))
        self.fused_proj = Linear(config.layer_dim * len(config.features), trunk)
        self.trunk = nn.ModuleList(MLP(trunk, trunk) for _ in range(config.trunk_blocks))
        gelu = nn.GELU(approximate="tanh")
        if config.lean_steps is None:
            self.step_pos_proj = nn.Sequential(
                nn.LayerNorm(self.step_dim),
                Linear(self.step_dim, trunk),
                gelu,
                Linear(trunk, trunk),
            )
        else:
            self.places = nn.Parameter(torch.zeros(config.lean_steps, trunk))
        self.output_norm = nn.LayerNorm(trunk)
        self.output = nn.Sequential(Linear(trunk, trunk), gelu, Linear(trunk, config.action_dim))

    def fuse_taps(self, taps: Taps) -> Tensor:
        """The state [B, trunk_dim] of the recorded features."""
        compressed = []
        for tap, sources, poolers, compressor in zip(
            taps, self.features, self.layer_poolers, self.layer_compressors, strict=True
        ):
            assert isinstance(poolers, nn.ModuleDict)
            pooled = [
                poolers[source](tap[source]) if source in poolers else tap[source].mean(1)
                for source in sources
            ]
            compressed.append(compressor(torch.cat(pooled, dim=-1)))
        state = self.fused_proj(self.fused_norm(torch.cat(compressed, dim=-1)))
        for block in self.trunk:
            state = state + block(state)
        return state

    def check_horizon(self, horizon: int) -> None:
        """Refuse more steps than a lean model knows.

        Raises:
            ConfigError: it is one.
        """
        if self.lean_steps is not None and horizon > self.lean_steps:
            raise ConfigError(
                f"this lean checkpoint knows {self.lean_steps} steps of a chunk, {horizon} are wanted; "
                f"load the fat or slim one, which knows any number"
            )

    def step_embeddings(self, horizon: int) -> Tensor:
        """Embeddings [horizon, trunk_dim] of a chunk's steps.

        Raises:
            ConfigError: a lean model doesn't know so many.
        """
        if self.lean_steps is None:
            weight = self.fused_proj.weight
            steps = torch.arange(horizon, device=weight.device, dtype=weight.dtype)
            return self.step_pos_proj(sinusoid(steps, self.step_dim))
        self.check_horizon(horizon)
        return self.places.narrow(0, 0, horizon)

    def forward(self, taps: Taps, horizon: int) -> Tensor:
        """Features of the taps -> actions [B, horizon, A]; any horizon, also one longer than trained."""
        return self.output(
            self.output_norm(self.fuse_taps(taps).unsqueeze(1) + self.step_embeddings(horizon))
        )
