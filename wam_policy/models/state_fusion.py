"""Light-WAM's action head: the states of a few depths of the video expert, pooled and fused, give the whole chunk at once.

Source: spec/lightwam.md section 1.6. Parameter names are the reference checkpoints' own.
"""

# B batch, S tokens, D width, Q queries, M merged slots, T actions in a chunk, A numbers per action

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F  # noqa: N812  # PyTorch's own name for it
from torch import Tensor, nn

from wam_policy.models.config import LightWAMConfig
from wam_policy.models.layers import sinusoid

Taps = Sequence[Mapping[str, Tensor]]
"""Per tap the features that were recorded there, by source, each [B, S, D]."""


class QueryPooler(nn.Module):
    """Learned queries attend to a tap's tokens; their answers are merged into one vector."""

    query_merge_logits: nn.Parameter | None
    query_slot_merge_logits: nn.Parameter | None
    query_merge_projector: nn.Sequential | None

    def __init__(self, config: LightWAMConfig) -> None:
        super().__init__()
        dim, queries = config.video_dim, config.queries
        self.token_norm = nn.LayerNorm(dim)
        self.query_tokens = nn.Parameter(0.02 * torch.randn(queries, dim))
        self.attn = nn.MultiheadAttention(dim, config.pool_heads, batch_first=True)
        self.query_merge_logits = self.query_slot_merge_logits = self.query_merge_projector = None
        if config.merge_dim is None:
            self.query_merge_logits = nn.Parameter(torch.zeros(queries))
        else:
            slots = config.merge_slots
            self.query_slot_merge_logits = nn.Parameter(torch.zeros(slots, queries))
            self.query_merge_projector = nn.Sequential(nn.LayerNorm(slots * dim), nn.Linear(slots * dim, config.merge_dim))
        self.output_norm = nn.LayerNorm(config.merge_dim or dim)

    def merge_weights(self) -> Tensor:
        """How much each query's answer counts in each merged slot, [M, Q]; rows sum to 1."""
        if self.query_slot_merge_logits is not None:
            return self.query_slot_merge_logits.softmax(-1)
        assert self.query_merge_logits is not None
        return self.query_merge_logits.unsqueeze(0).softmax(-1)

    def attend(self, tokens: Tensor, *, weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, S, D] -> answers [B, Q, D] and, if asked for, attention weights [B, heads, Q, S]."""
        normed = self.token_norm(tokens)
        queries = self.query_tokens.expand(len(tokens), -1, -1)
        return self.attn(queries, normed, normed, need_weights=weights, average_attn_weights=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, S, D] -> one vector [B, merge_dim or D]."""
        answers, _ = self.attend(tokens)
        merged = (self.merge_weights() @ answers).flatten(1)
        return self.output_norm(merged if self.query_merge_projector is None else self.query_merge_projector(merged))


class MLP(nn.Module):
    """Norm and two linear layers."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, out), nn.Linear(out, out)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., out]."""
        return self.fc2(F.gelu(self.fc1(self.norm(x)), approximate="tanh"))


class StateFusionActionExpert(nn.Module):
    """Pools every tap, compresses and joins them, and reads one action per step of the chunk."""

    def __init__(self, config: LightWAMConfig) -> None:
        super().__init__()
        self.features, self.step_dim = config.features, config.step_dim
        width, trunk = config.merge_dim or config.video_dim, config.trunk_dim
        learned = config.pooling == "learned_query"
        self.layer_poolers = nn.ModuleList(
            nn.ModuleDict({source: QueryPooler(config) for source in sources if learned}) for sources in config.features
        )
        self.layer_compressors = nn.ModuleList(MLP(width * len(sources), config.layer_dim) for sources in config.features)
        self.fused_norm = nn.LayerNorm(config.layer_dim * len(config.features))
        self.fused_proj = nn.Linear(config.layer_dim * len(config.features), trunk)
        self.trunk = nn.ModuleList(MLP(trunk, trunk) for _ in range(config.trunk_blocks))
        gelu = nn.GELU(approximate="tanh")
        self.step_pos_proj = nn.Sequential(
            nn.LayerNorm(self.step_dim), nn.Linear(self.step_dim, trunk), gelu, nn.Linear(trunk, trunk)
        )
        self.output_norm = nn.LayerNorm(trunk)
        self.output = nn.Sequential(nn.Linear(trunk, trunk), gelu, nn.Linear(trunk, config.action_dim))

    def fuse(self, taps: Taps) -> Tensor:
        """The state [B, trunk_dim] of the recorded features."""
        compressed = []
        for tap, sources, poolers, compressor in zip(
            taps, self.features, self.layer_poolers, self.layer_compressors, strict=True
        ):
            assert isinstance(poolers, nn.ModuleDict)
            pooled = [poolers[source](tap[source]) if source in poolers else tap[source].mean(1) for source in sources]
            compressed.append(compressor(torch.cat(pooled, dim=-1)))
        state = self.fused_proj(self.fused_norm(torch.cat(compressed, dim=-1)))
        for block in self.trunk:
            state = state + block(state)
        return state

    def forward(self, taps: Taps, horizon: int) -> Tensor:
        """Features of the taps -> actions [B, horizon, A]; any horizon, also one longer than trained."""
        state = self.fuse(taps)
        steps = torch.arange(horizon, device=state.device, dtype=state.dtype)
        places = self.step_pos_proj(sinusoid(steps, self.step_dim))
        return self.output(self.output_norm(state.unsqueeze(1) + places))
