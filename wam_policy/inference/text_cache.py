"""Keeps what an instruction contributes to cross-attention, so that it is computed once and not at every step.

The proprio token, which changes with every observation, has a slot of its own. Source: spec/fastwam.md section 7.3, items 3, 5.
"""

# B batch, K slots, L rows of a padded prompt, n tokens of a prompt, H heads, d head width

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wam_policy.models.encoders.text import PromptEmbeddings
from wam_policy.models.fast_wam.model import FastWAM
from wam_policy.models.layers.attention import KeyValue
from wam_policy.models.layers.mot import copy_into, write_kv
from wam_policy.models.layers.text_padding import MIN_PADDING_SLOTS, padding_biases, slots_for
from wam_policy.models.layers.transformer import DiT, Text
from wam_policy.models.light_wam.folded import LeanVideo
from wam_policy.models.registry import Model

MAX_PROMPTS = 64  # prompts whose entries are kept


class TextEntry(NamedTuple):
    """One prompt in an expert's slots."""

    layers: list[KeyValue]  # [1, H, K, d] per block; the proprio token's slot holds nothing yet
    bias: Tensor  # [K]


def text_experts(model: Model) -> Sequence[DiT | LeanVideo]:
    """What of a model reads text."""
    return (model.video, model.action) if isinstance(model, FastWAM) else (model.video,)


class TextCache:
    """Entries of prompts, computed when they are first asked for."""

    def __init__(self, model: Model, prompts: PromptEmbeddings, tokens: int) -> None:
        """Begin with none, and with room for prompts of up to so many tokens."""
        self.model, self.prompts, self.tokens = model, prompts, min(tokens, prompts.token_length)
        self.proprio = model.proprio_encoder is not None
        self.slots = slots_for(self.tokens, prompts.token_length, proprio=self.proprio)
        self._entries: dict[
            str, tuple[Tensor, list[TextEntry]]
        ] = {}  # with the embedding that they come from

    def length(self, prompt: str) -> int:
        """Tokens of a prompt; it is embedded, if it wasn't yet."""
        self.prompts.add([prompt])
        return len(self.prompts.table[prompt])

    def allocate_slots(self, size: int) -> list[Text]:
        """Slots for `size` samples, one `Text` per expert, filled by `put`."""
        config, weight = self.model.config, self.model.video.patch_embedding.weight
        shape, layers = (size, config.heads, self.slots, config.head_dim), config.layers
        bias = weight.new_zeros(size, 1, 1, self.slots)
        return [
            Text(
                [KeyValue(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in range(layers)],
                bias,
            )
            for _ in text_experts(self.model)
        ]

    @torch.no_grad()
    def entries(self, prompt: str) -> list[TextEntry]:
        """A prompt's entries, one per expert: the same as long as its embedding is."""
        self.prompts.add([prompt])
        embedding = self.prompts.table[prompt]
        if prompt not in self._entries or self._entries[prompt][0] is not embedding:
            self._entries[prompt] = (
                embedding,
                [self._entry(prompt, expert) for expert in text_experts(self.model)],
            )
            if len(self._entries) > MAX_PROMPTS:
                del self._entries[next(iter(self._entries))]
        return self._entries[prompt][1]

    def write_slots(self, entries: Sequence[TextEntry], texts: Sequence[Text], sample: int) -> None:
        """Write a prompt's entries into one sample's slots of every expert."""
        for entry, text in zip(entries, texts, strict=True):
            assert text.bias is not None
            copy_into(text.bias.select(0, sample), entry.bias.view(1, 1, -1))
            for new, whole in zip(entry.layers, text.layers, strict=True):
                write_kv(
                    new, KeyValue(whole.key.narrow(0, sample, 1), whole.value.narrow(0, sample, 1))
                )

    def _entry(self, prompt: str, expert: DiT | LeanVideo) -> TextEntry:
        weight = self.model.video.patch_embedding.weight
        tokens, rows, first = self.length(prompt), self.prompts.token_length, int(self.proprio)
        padding = self.slots - first - tokens
        assert padding >= min(MIN_PADDING_SLOTS, rows - tokens), (
            f"{tokens} tokens don't fit {self.slots} slots"
        )
        embedding = self.prompts.embed([prompt], device=weight.device, dtype=weight.dtype)
        used = embedding.narrow(
            1, 0, min(tokens + 1, rows)
        )  # its tokens, and one row for all of the padding
        where = torch.tensor(
            [0] * first + list(range(tokens)) + [used.shape[1] - 1] * padding, device=weight.device
        )
        layers = [
            KeyValue(*(x.index_select(2, where) for x in pair))
            for pair in expert.embed_text(used).layers
        ]
        biases = [0.0] * (first + tokens) + padding_biases(rows - tokens, padding, weight.dtype)
        return TextEntry(layers, torch.tensor(biases, dtype=weight.dtype, device=weight.device))
