"""The parts both experts are made of: norms, rotary positions, attention and the modulated transformer block.

Source: spec/fastwam.md sections 2.1 to 2.5. Parameter names are the reference checkpoints' own.
"""

# B batch, S tokens, D width, H heads, d head width, G groups of tokens that share a timestep

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from wam_policy.errors import ObservationError
from wam_policy.models.layers.attention import Attention, KeyValue, attend
from wam_policy.models.layers.linear import Linear
from wam_policy.models.layers.precision import Precision
from wam_policy.models.layers.rope import Rope, rotate, sinusoid


class TimeEmbedding(NamedTuple):
    """What an expert makes of timesteps: what its head reads, and the modulations of its blocks."""

    embedding: Tensor  # [B, G, D]
    modulation: Tensor  # [B, G, 6, D]


class SharedInput(NamedTuple):
    """What every block makes its own of, when it runs: embedded text, or the modulation of timesteps."""

    source: Tensor  # [B, L, D] or [B, G, 6, D]


class Text(NamedTuple):
    """What an expert's tokens see of the text."""

    layers: Sequence[KeyValue]  # one pair per block
    bias: Tensor | None = (
        None  # [B, 1, 1, L], added to the scores: a key that stands for n equal ones has ln(n); None: zero
    )


class SharedText(NamedTuple):
    """The same, of which every block makes its keys and values itself."""

    layers: Sequence[SharedInput]
    bias: Tensor | None = None  # as in `Text`


class BlockInput(NamedTuple):
    """Input of one transformer block."""

    tokens: Tensor  # [B, S, D]
    modulation: Tensor | SharedInput  # [B, G, 6, D], or the source the block adds its table to
    rope: Rope
    text: KeyValue | SharedInput  # keys and values, or the embedded text [B, L, D]
    text_bias: Tensor | None = None  # as in `Text`
    context_kv: Sequence[KeyValue] = ()  # see `attend`, as the next two
    num_observed_tokens: int = 0
    mask: Tensor | None = None
    return_kv: bool = True  # whether the keys and values of the tokens are returned


TrainForward = Callable[["Block", BlockInput], tuple[Tensor, KeyValue | None]]
"""A replacement of `Block.block_forward` for training."""


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


class Block(nn.Module):
    """One transformer block: modulated self-attention, text cross-attention, modulated feed-forward.

    Self-attention is split in two halves, so that tokens of several experts can attend to each other in between.
    """

    def __init__(
        self, dim: int, ffn_dim: int, heads: int, head_dim: int, eps: float, precision: Precision
    ) -> None:
        super().__init__()
        self.eps = eps
        self._train_forward: TrainForward | None = None
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.self_attn = Attention(dim, heads, head_dim, eps, precision)
        self.cross_attn = Attention(dim, heads, head_dim, eps, precision)
        self.norm3 = nn.LayerNorm(dim, eps)
        self.ffn = nn.Sequential(
            Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), Linear(ffn_dim, dim)
        )

    def set_train_forward(self, forward: TrainForward | None) -> None:
        """Replace the forward pass wherever gradients are recorded.

        `compile_training` installs a compiled or checkpointed form of `block_forward` here. A wrapper module is not an option:
        it would rename the block's parameters.

        Args:
            forward: Takes the block and its input, and computes what `block_forward` computes; None: `block_forward`.
        """
        self._train_forward = forward

    def forward(self, inputs: BlockInput) -> tuple[Tensor, KeyValue | None]:
        """Run `block_forward`, or what `set_train_forward` installed where gradients are recorded."""
        if self._train_forward is None or not torch.is_grad_enabled():
            return self.block_forward(inputs)
        return self._train_forward(self, inputs)

    def block_forward(self, inputs: BlockInput) -> tuple[Tensor, KeyValue | None]:
        """Return the tokens [B, S, D] after the block, and their keys and values if `return_kv` is set."""
        modulation = self.add_modulation(inputs.modulation)
        text = inputs.text
        if isinstance(text, SharedInput):
            text = self.text_key_value(text.source)
        query, self_kv = self.attention_inputs(inputs.tokens, modulation, inputs.rope)
        attended = attend(
            query,
            self_kv,
            inputs.context_kv,
            num_observed_tokens=inputs.num_observed_tokens,
            mask=inputs.mask,
        )
        tokens = self.finish_block(inputs.tokens, attended, modulation, text, inputs.text_bias)
        return tokens, self_kv.returned() if inputs.return_kv else None

    def _norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps)

    def add_modulation(self, modulation: Tensor | SharedInput) -> Tensor:
        """The shift, scale and gate of the attention, then of the feed-forward: [..., 6, D]."""
        return (
            self.modulation + modulation.source
            if isinstance(modulation, SharedInput)
            else modulation
        )

    def self_key_value(self, x: Tensor, modulation: Tensor | SharedInput, rope: Rope) -> KeyValue:
        """Only the keys and values of tokens [B, S, D], laid out as `through` returns them."""
        return self.attention_inputs(x, self.add_modulation(modulation), rope)[1].returned()

    def text_key_value(self, embedded: Tensor) -> KeyValue:
        """Keys and values of embedded text tokens [B, L, D]."""
        return self.cross_attn.key_value(embedded)

    def attention_inputs(
        self, x: Tensor, modulation: Tensor, rope: Rope
    ) -> tuple[Tensor, KeyValue]:
        """Rotated queries [B, H, S, d], and keys and values, of tokens [B, S, D] with modulations [B, G, 6, D]."""
        shift, scale = modulation.unbind(2)[:2]
        query, (key, value) = self.self_attn.query_key_value(modulate(self._norm(x), shift, scale))
        return rotate(query, rope), KeyValue(rotate(key, rope), value)

    def finish_block(
        self,
        x: Tensor,
        attended: Tensor,
        modulation: Tensor,
        text: KeyValue,
        bias: Tensor | None = None,
    ) -> Tensor:
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
        self.dim, self.head_dim, self.freq_dim, self.eps, self.precision = (
            dim,
            head_dim,
            freq_dim,
            eps,
            precision,
        )
        self.text_embedding = text_mlp(text_dim, dim)
        self.time_embedding = nn.Sequential(Linear(freq_dim, dim), nn.SiLU(), Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        blocks = nn.ModuleList(
            Block(dim, ffn_dim, heads, head_dim, eps, precision) for _ in range(layers)
        )
        self.blocks = cast("Sequence[Block]", blocks)  # a module list, seen as what it holds

    def embed_time(self, t: Tensor) -> TimeEmbedding:
        """Timesteps [B, G] -> their embedding and the blocks' modulations."""
        embedded = self.time_embedding(
            sinusoid(t, self.freq_dim).to(next(self.time_embedding.parameters()).dtype)
        )
        return TimeEmbedding(embedded, self.time_projection(embedded).unflatten(-1, (6, self.dim)))

    def modulations(self, time: Tensor) -> list[Tensor]:
        """Each block's `modulated`, [..., 6, D] of `time` [..., 6, D]."""
        return [block.add_modulation(SharedInput(time)) for block in self.blocks]

    def embed_text(self, context: Tensor) -> Text:
        """Raw context [B, L, text_dim] -> cross-attention keys and values."""
        embedded = self.text_embedding(context)
        return Text([block.text_key_value(embedded) for block in self.blocks])

    def shared_text(self, context: Tensor, bias: Tensor | None = None) -> SharedText:
        """Raw context [B, L, text_dim] -> the text, of which every block makes its keys and values itself.

        So a block is the only one to touch its weights, which may then lie on many devices.

        Args:
            context: the rows.
            bias: [B, K], of the first K of them; see `padding.condensed`.
        """
        embedded = self.text_embedding(context)
        if bias is not None:
            bias = F.pad(bias, (0, context.shape[1] - bias.shape[1])).to(embedded.dtype)[
                :, None, None
            ]
        return SharedText([SharedInput(embedded)] * len(self.blocks), bias)

    def shared_modulations(self, time: TimeEmbedding) -> Sequence[SharedInput]:
        """The same for modulations."""
        return [SharedInput(time.modulation)] * len(self.blocks)

    def fuse(self) -> None:
        """Keep projections that read the same as one matrix; see `Attention.fuse`."""
        for block in self.blocks:
            block.self_attn.fuse("qkv")
            block.cross_attn.fuse("kv")
