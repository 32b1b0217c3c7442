"""Attention: RMS norm, the projections of queries, keys and values, and attention over cached keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from wam_policy.models.layers.linear import FusedLinear, Linear
from wam_policy.models.layers.precision import Precision


class KeyValue(NamedTuple):
    """Keys (normalised, rotated) and values of a token sequence, each [B, H, S, d]."""

    key: Tensor
    value: Tensor

    def returned(self) -> KeyValue:
        """As a region that is compiled once may return them: tensors of their own, not views of what they were computed in."""
        if not torch.compiler.is_compiling():
            return self
        return KeyValue(*(x.clone(memory_format=torch.contiguous_format) for x in self))


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, in float32; unless fused, the weight is applied in the input's dtype."""

    def __init__(self, dim: int, eps: float, *, fused: bool) -> None:
        super().__init__()
        self.eps, self.fused = eps, fused
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., D]."""
        if self.fused:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(
            x.dtype
        ) * self.weight


def attend(
    query: Tensor,
    self_kv: KeyValue,
    context_kv: Sequence[KeyValue] = (),
    *,
    num_observed_tokens: int = 0,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention of one expert's tokens, [B, H, S, d].

    Args:
        query: [B, H, S, d].
        self_kv: keys and values of the same tokens.
        context_kv: keys and values of other tokens, which all of them see too.
        num_observed_tokens: the first so many tokens see only each other (the observed frame of a clip).
        mask: bool [B, 1, 1, seen + S], False hides a key from a sample.
    """
    if num_observed_tokens:
        key, value = (x.narrow(2, 0, num_observed_tokens) for x in self_kv)
        observing, later = query.split(
            (num_observed_tokens, query.shape[2] - num_observed_tokens), dim=2
        )
        observed = F.scaled_dot_product_attention(observing, key, value)
        return torch.cat((observed, F.scaled_dot_product_attention(later, *self_kv)), dim=2)
    key, value = (
        self_kv
        if not context_kv
        else (torch.cat(parts, dim=2) for parts in zip(*context_kv, self_kv, strict=True))
    )
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


class Attention(nn.Module):
    """Projections of multi-head attention whose inner width may differ from the model's; norms span all heads."""

    def __init__(
        self, dim: int, heads: int, head_dim: int, eps: float, precision: Precision
    ) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.fused: FusedLinear | None = None
        self.q, self.k, self.v = Linear(dim, inner), Linear(dim, inner), Linear(dim, inner)
        self.o = Linear(inner, dim)
        self.norm_q, self.norm_k = (
            RMSNorm(inner, eps, fused=precision.fused_norm) for _ in range(2)
        )

    def fuse(self, names: str) -> None:
        """Compute the projections `names`, "qkv" or "kv", as one product from now on; see `FusedLinear`."""
        self.fused = FusedLinear({name: getattr(self, name) for name in names})

    def _project(self, names: str, x: Tensor) -> Sequence[Tensor]:
        """Each named projection of tokens [B, S, D], [B, S, H·d]."""
        if self.fused is not None and self.fused.names == tuple(names):
            return self.fused(x)
        return [getattr(self, name)(x) for name in names]

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def query(self, x: Tensor) -> Tensor:
        """Normalised queries [B, H, S, d] of tokens [B, S, D]."""
        return self._split(self.norm_q(self.q(x)))

    def key_value(self, x: Tensor) -> KeyValue:
        """Normalised keys and values of tokens [B, S, D]."""
        key, value = self._project("kv", x)
        return KeyValue(self._split(self.norm_k(key)), self._split(value))

    def query_key_value(self, x: Tensor) -> tuple[Tensor, KeyValue]:
        """Both, of the same tokens."""
        query, key, value = self._project("qkv", x)
        return self._split(self.norm_q(query)), KeyValue(
            self._split(self.norm_k(key)), self._split(value)
        )

    def merge(self, x: Tensor) -> Tensor:
        """Project attention outputs [B, H, S, d] back to [B, S, D]."""
        return self.o(x.transpose(1, 2).flatten(2))
