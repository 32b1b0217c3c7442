"""Attention: RMS norm, the projections of queries, keys and values, and attention over cached keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from wam_policy.models.layers.linear import Linear, linear
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


def _join_rows(parts: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape, one after the other: where they lie so already, that memory, else new memory."""
    first = parts[0]
    storage, size = first.untyped_storage(), first.numel()
    for i, part in enumerate(parts):
        beside = (
            part.untyped_storage()._cdata == storage._cdata
            and part.is_contiguous()
            and part.shape == first.shape
        )
        if not beside or part.storage_offset() != first.storage_offset() + i * size:
            return torch.cat(list(parts))
    shape = (len(parts) * len(first), *first.shape[1:])
    return first.detach().as_strided(shape, first.stride(), first.storage_offset())


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

    fused_weight: Tensor
    fused_bias: Tensor

    def __init__(
        self, dim: int, heads: int, head_dim: int, eps: float, precision: Precision
    ) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads, self.fused = heads, ""
        self.q, self.k, self.v = Linear(dim, inner), Linear(dim, inner), Linear(dim, inner)
        self.o = Linear(inner, dim)
        self.norm_q, self.norm_k = (
            RMSNorm(inner, eps, fused=precision.fused_norm) for _ in range(2)
        )

    @torch.no_grad()
    def fuse(self, names: str) -> None:
        """Keep the matrices of the projections `names`, "qkv" or "kv", as one, of which they become parts: one product.

        Names and values of the parameters stay as they are. For inference only: no gradient reaches the parts.
        """
        layers = [getattr(self, name) for name in names]
        for kind in ("weight", "bias"):
            parameters = [getattr(layer, kind) for layer in layers]
            whole = _join_rows(parameters)
            for parameter, part in zip(parameters, whole.chunk(len(layers)), strict=True):
                parameter.data = part
            self.register_buffer(f"fused_{kind}", whole, persistent=False)
        self.fused = names

    def _project(self, names: str, x: Tensor) -> Sequence[Tensor]:
        """Each named projection of tokens [B, S, D], [B, S, H·d]."""
        if self.fused == names:
            return linear(x, self.fused_weight, self.fused_bias).chunk(len(names), dim=-1)
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
