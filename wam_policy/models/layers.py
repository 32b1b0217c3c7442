"""The parts both experts are made of: norms, rotary positions, attention and the modulated transformer block.

Source: spec/fastwam.md sections 2.1 to 2.5. Parameter names are the reference checkpoints' own.
"""

# B batch, S tokens, D width, H heads, d head width, G groups of tokens that share a timestep

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from wam_policy.errors import ObservationError
from wam_policy.models.linear import Linear, linear

THETA = 10_000.0


class Precision(NamedTuple):
    """Where a model rounds; spec/fastwam.md section 2.2."""

    rope: torch.dtype  # rotary tables, and what rotations are computed in
    time: torch.dtype | None  # timesteps, step sizes and what is denoised; None: the weights' dtype
    fused_norm: bool  # True: one kernel, rounded once; False: rounded before the weight is applied


REFERENCE = Precision(rope=torch.float64, time=None, fused_norm=False)  # as the released weights were trained and evaluated
FAST = Precision(rope=torch.float32, time=torch.float32, fused_norm=True)
PRECISIONS = {"reference": REFERENCE, "fast": FAST}


class Rope(NamedTuple):
    """Rotary tables of a token sequence: cos and sin, [S, d / 2]."""

    cos: Tensor
    sin: Tensor


class TimeEmbedding(NamedTuple):
    """What an expert makes of timesteps: what its head reads, and the modulations of its blocks."""

    embedding: Tensor  # [B, G, D]
    modulation: Tensor  # [B, G, 6, D]


class KeyValue(NamedTuple):
    """Keys (normalised, rotated) and values of a token sequence, each [B, H, S, d]."""

    key: Tensor
    value: Tensor

    def returned(self) -> KeyValue:
        """As a region that is compiled once may return them: tensors of their own, not views of what they were computed in."""
        if not torch.compiler.is_compiling():
            return self
        return KeyValue(*(x.clone(memory_format=torch.contiguous_format) for x in self))


class Shared(NamedTuple):
    """What every block makes its own of, when it runs: embedded text, or the modulation of timesteps."""

    source: Tensor  # [B, L, D] or [B, G, 6, D]


class Text(NamedTuple):
    """What an expert's tokens see of the text."""

    layers: Sequence[KeyValue]  # one pair per block
    bias: Tensor | None = None  # [B, 1, 1, L], added to the scores: a key that stands for n equal ones has ln(n); None: zero


class SharedText(NamedTuple):
    """The same, of which every block makes its keys and values itself."""

    layers: Sequence[Shared]
    bias: Tensor | None = None  # as in `Text`


def _angles(positions: int, dim: int) -> Tensor:
    frequencies = THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return torch.outer(torch.arange(positions, dtype=torch.float64), frequencies)


@functools.lru_cache(maxsize=64)
def action_rope(horizon: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> Rope:
    """Tables of action positions 0 .. horizon − 1."""
    with torch.inference_mode(False):  # a table outlives the mode it was made in
        angles = _angles(horizon, head_dim)
        return Rope(angles.cos().to(device, dtype), angles.sin().to(device, dtype))


@functools.lru_cache(maxsize=64)
def video_rope(grid: tuple[int, int, int], head_dim: int, device: torch.device, dtype: torch.dtype, start: int = 0) -> Rope:
    """Tables of a (frames, rows, columns) token grid that begins at frame `start`.

    The channel pairs are split between the three axes.
    """
    with torch.inference_mode(False):
        spatial = 2 * (head_dim // 6)  # 44 | 42 | 42 channels of 128
        ends = (start + grid[0], *grid[1:])
        axes = [_angles(n, dim) for n, dim in zip(ends, (head_dim - 2 * spatial, spatial, spatial), strict=True)]
        axes[0] = axes[0][start:]
        shapes = [(-1, 1, 1), (1, -1, 1), (1, 1, -1)]
        parts = [a.view(*shape, a.shape[-1]).expand(*grid, -1) for a, shape in zip(axes, shapes, strict=True)]
        angles = torch.cat(parts, dim=-1).flatten(0, 2)
        return Rope(angles.cos().to(device, dtype), angles.sin().to(device, dtype))


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate adjacent channel pairs of `x` [B, H, S, d] by the tables, in their dtype."""
    even, odd = x.to(rope.cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * rope.cos - odd * rope.sin, even * rope.sin + odd * rope.cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """Embed timesteps [...] as [..., dim]: cosines first, angles in float64, result in `t`'s dtype."""
    half = dim // 2
    frequencies = THETA ** -(torch.arange(half, dtype=torch.float64, device=t.device) / half)
    angles = t.double().unsqueeze(-1) * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(t.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`x·(1 + scale) + shift`, with [B, G, D] modulations for the G equal groups of the S tokens of `x` [B, S, D]."""
    grouped = x.unflatten(1, (shift.shape[1], -1))
    return (grouped * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)).flatten(1, 2)


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """`gate·x`, with a [B, G, D] gate for the G equal groups of the S tokens of `x` [B, S, D]."""
    return (x.unflatten(1, (gate.shape[1], -1)) * gate.unsqueeze(2)).flatten(1, 2)


def append_proprio(prompt: Tensor, proprio: Tensor | None, encoder: nn.Linear | None) -> Tensor:
    """Append the proprio token, the encoded state [B, P], to prompt embeddings [B, L, text_dim].

    Raises:
        ObservationError: there is a state and no encoder, or an encoder and no state.
    """
    if (encoder is None) != (proprio is None):
        raise ObservationError(
            "this model was trained without proprioception: pass None"
            if encoder is None
            else f"this model needs its {encoder.in_features} numbers of proprioception, got none"
        )
    if encoder is None or proprio is None:
        return prompt
    return torch.cat((prompt, encoder(proprio.to(prompt.dtype)).unsqueeze(1)), dim=1)


def text_mlp(text_dim: int, dim: int) -> nn.Sequential:
    """An expert's own embedding of the raw context."""
    return nn.Sequential(Linear(text_dim, dim), nn.GELU(approximate="tanh"), Linear(dim, dim))


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
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


def _together(parts: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape, one after the other: where they lie so already, that memory, else new memory."""
    first = parts[0]
    storage, size = first.untyped_storage(), first.numel()
    for i, part in enumerate(parts):
        beside = part.untyped_storage()._cdata == storage._cdata and part.is_contiguous() and part.shape == first.shape
        if not beside or part.storage_offset() != first.storage_offset() + i * size:
            return torch.cat(list(parts))
    shape = (len(parts) * len(first), *first.shape[1:])
    return first.detach().as_strided(shape, first.stride(), first.storage_offset())


def attend(
    query: Tensor, own: KeyValue, seen: Sequence[KeyValue] = (), *, first: int = 0, mask: Tensor | None = None
) -> Tensor:
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
    key, value = own if not seen else (torch.cat(parts, dim=2) for parts in zip(*seen, own, strict=True))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


class Attention(nn.Module):
    """Projections of multi-head attention whose inner width may differ from the model's; norms span all heads."""

    fused_weight: Tensor
    fused_bias: Tensor

    def __init__(self, dim: int, heads: int, head_dim: int, eps: float, precision: Precision) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads, self.fused = heads, ""
        self.q, self.k, self.v = Linear(dim, inner), Linear(dim, inner), Linear(dim, inner)
        self.o = Linear(inner, dim)
        self.norm_q, self.norm_k = (RMSNorm(inner, eps, fused=precision.fused_norm) for _ in range(2))

    @torch.no_grad()
    def fuse(self, names: str) -> None:
        """Keep the matrices of the projections `names`, "qkv" or "kv", as one, of which they become parts: one product.

        Names and values of the parameters stay as they are. For inference only: no gradient reaches the parts.
        """
        layers = [getattr(self, name) for name in names]
        for kind in ("weight", "bias"):
            parameters = [getattr(layer, kind) for layer in layers]
            whole = _together(parameters)
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
        return self._split(self.norm_q(query)), KeyValue(self._split(self.norm_k(key)), self._split(value))

    def merge(self, x: Tensor) -> Tensor:
        """Project attention outputs [B, H, S, d] back to [B, S, D]."""
        return self.o(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One transformer block: modulated self-attention, text cross-attention, modulated feed-forward.

    Self-attention is split in two halves, so that tokens of several experts can attend to each other in between.
    """

    def __init__(self, dim: int, ffn_dim: int, heads: int, head_dim: int, eps: float, precision: Precision) -> None:
        super().__init__()
        self.eps = eps
        self.learning: Callable[..., tuple[Tensor, KeyValue | None]] | None = None  # `through` as `compile_training` wants it
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.self_attn = Attention(dim, heads, head_dim, eps, precision)
        self.cross_attn = Attention(dim, heads, head_dim, eps, precision)
        self.norm3 = nn.LayerNorm(dim, eps)
        self.ffn = nn.Sequential(Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), Linear(ffn_dim, dim))

    def forward(self, *arguments: Any) -> tuple[Tensor, KeyValue | None]:
        """`through`; where gradients are wanted as `compile_training` says: compiled, or computed anew on the way back."""
        if self.learning is None or not torch.is_grad_enabled():
            return self.through(*arguments)
        return self.learning(self, *arguments)

    def through(
        self,
        x: Tensor,
        modulation: Tensor | Shared,
        rope: Rope,
        text: KeyValue | Shared,
        bias: Tensor | None,
        seen: Sequence[KeyValue],
        first: int,
        mask: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, KeyValue | None]:
        """Tokens [B, S, D] after the block, and their keys and values in it where they are kept.

        Args:
            x: [B, S, D].
            modulation: [B, G, 6, D], or what the block's own is to be added to.
            rope: of the tokens.
            text: keys and values of the text, or the embedded text [B, L, D].
            bias: as in `Text`.
            seen: see `attend`, like the next two.
            first: see `attend`.
            mask: see `attend`.
            keep: whether keys and values are wanted.
        """
        modulation = self.modulated(modulation)
        text = self.text(text.source) if isinstance(text, Shared) else text
        query, own = self.attention_inputs(x, modulation, rope)
        attended = attend(query, own, seen, first=first, mask=mask)
        return self.finish(x, attended, modulation, text, bias), own.returned() if keep else None

    def _norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps)

    def modulated(self, modulation: Tensor | Shared) -> Tensor:
        """The shift, scale and gate of the attention, then of the feed-forward: [..., 6, D]."""
        return self.modulation + modulation.source if isinstance(modulation, Shared) else modulation

    def keys(self, x: Tensor, modulation: Tensor | Shared, rope: Rope) -> KeyValue:
        """Only the keys and values of tokens [B, S, D], laid out as `through` returns them."""
        return self.attention_inputs(x, self.modulated(modulation), rope)[1].returned()

    def text(self, embedded: Tensor) -> KeyValue:
        """Keys and values of embedded text tokens [B, L, D]."""
        return self.cross_attn.key_value(embedded)

    def attention_inputs(self, x: Tensor, modulation: Tensor, rope: Rope) -> tuple[Tensor, KeyValue]:
        """Rotated queries [B, H, S, d], and keys and values, of tokens [B, S, D] with modulations [B, G, 6, D]."""
        shift, scale = modulation.unbind(2)[:2]
        query, (key, value) = self.self_attn.query_key_value(modulate(self._norm(x), shift, scale))
        return rotate(query, rope), KeyValue(rotate(key, rope), value)

    def finish(self, x: Tensor, attended: Tensor, modulation: Tensor, text: KeyValue, bias: Tensor | None = None) -> Tensor:
        """The rest of the block: tokens [B, S, D] and attention outputs [B, H, S, d] -> tokens; `bias` as in `Text`."""
        _, _, gate, shift, scale, ffn_gate = modulation.unbind(2)
        x = x + gated(self.self_attn.merge(attended), gate)
        query = self.cross_attn.query(self.norm3(x))
        x = x + self.cross_attn.merge(F.scaled_dot_product_attention(query, *text, attn_mask=bias))
        return x + gated(self.ffn(modulate(self._norm(x), shift, scale)), ffn_gate)


class DiT(nn.Module):
    """A stack of blocks with its own text and time embeddings: what the video and the action expert share."""

    def __init__(
        self,
        *,
        dim: int,
        ffn_dim: int,
        layers: int,
        heads: int,
        head_dim: int,
        text_dim: int,
        freq_dim: int,
        eps: float,
        precision: Precision,
    ) -> None:
        super().__init__()
        self.dim, self.head_dim, self.freq_dim, self.eps, self.precision = dim, head_dim, freq_dim, eps, precision
        self.text_embedding = text_mlp(text_dim, dim)
        self.time_embedding = nn.Sequential(Linear(freq_dim, dim), nn.SiLU(), Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        blocks = nn.ModuleList(Block(dim, ffn_dim, heads, head_dim, eps, precision) for _ in range(layers))
        self.blocks = cast("Sequence[Block]", blocks)  # a module list, seen as what it holds

    def embed_time(self, t: Tensor) -> TimeEmbedding:
        """Timesteps [B, G] -> their embedding and the blocks' modulations."""
        embedded = self.time_embedding(sinusoid(t, self.freq_dim).to(next(self.time_embedding.parameters()).dtype))
        return TimeEmbedding(embedded, self.time_projection(embedded).unflatten(-1, (6, self.dim)))

    def modulations(self, time: Tensor) -> list[Tensor]:
        """Each block's `modulated`, [..., 6, D] of `time` [..., 6, D]."""
        return [block.modulated(Shared(time)) for block in self.blocks]

    def embed_text(self, context: Tensor) -> Text:
        """Raw context [B, L, text_dim] -> cross-attention keys and values."""
        embedded = self.text_embedding(context)
        return Text([block.text(embedded) for block in self.blocks])

    def shared_text(self, context: Tensor, bias: Tensor | None = None) -> SharedText:
        """Raw context [B, L, text_dim] -> the text, of which every block makes its keys and values itself.

        So a block is the only one to touch its weights, which may then lie on many devices.

        Args:
            context: the rows.
            bias: [B, K], of the first K of them; see `padding.condensed`.
        """
        embedded = self.text_embedding(context)
        if bias is not None:
            bias = F.pad(bias, (0, context.shape[1] - bias.shape[1])).to(embedded.dtype)[:, None, None]
        return SharedText([Shared(embedded)] * len(self.blocks), bias)

    def shared_modulations(self, time: TimeEmbedding) -> Sequence[Shared]:
        """The same for modulations."""
        return [Shared(time.modulation)] * len(self.blocks)

    def fuse(self) -> None:
        """Keep projections that read the same as one matrix; see `Attention.fuse`."""
        for block in self.blocks:
            block.self_attn.fuse("qkv")
            block.cross_attn.fuse("kv")
