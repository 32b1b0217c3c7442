"""Instructions to embeddings: a table of known prompts in front of transformers' UMT5 encoder.

Source: spec/fastwam.md section 4.3. Rows past a prompt's end are exactly zero and take part in attention; that is what the
weights were trained with.
"""

# n tokens of a prompt, L padded tokens, D text width

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F  # noqa: N812  # PyTorch's own name for it
from torch import Tensor

from wam_policy.errors import PromptError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, UMT5EncoderModel


class TextEncoder:
    """UMT5 encoder and tokenizer."""

    def __init__(self, model: UMT5EncoderModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer

    @torch.no_grad()
    def encode(self, prompt: str, token_length: int) -> Tensor:
        """Embed one prompt: [n, D] of its n tokens, end-of-sentence included, at most `token_length`."""
        tokens = self.tokenizer(
            prompt, max_length=token_length, truncation=True, return_tensors="pt"
        )
        device = self.model.device
        states = self.model(
            input_ids=tokens["input_ids"].to(device),
            attention_mask=tokens["attention_mask"].to(device),
        ).last_hidden_state
        return states[0]


class EmbeddingStore(Protocol):
    """Where embeddings are kept between processes."""

    def get(self, prompt: str) -> Tensor | None:
        """The embedding [n, D] of a prompt; None: it isn't there."""

    def put(self, prompt: str, embedding: Tensor) -> None:
        """Keep an embedding [n, D]."""


class PromptEmbeddings:
    """A table of prompt embeddings that grows by a text encoder, where there is one."""

    def __init__(
        self,
        table: dict[str, Tensor],
        *,
        token_length: int,
        text_dim: int,
        encoder: Callable[[], TextEncoder] | None = None,
        cache: EmbeddingStore | None = None,
    ) -> None:
        """Begin with known prompts.

        Args:
            table: prompt -> [n, D] embeddings.
            token_length: rows every prompt is padded to.
            text_dim: width D.
            encoder: gives the text encoder; called for the first unknown prompt. None: there is none.
            cache: where embeddings are looked for before they are computed, and kept.
        """
        self.table, self.token_length, self.text_dim = dict(table), token_length, text_dim
        self._load, self.cache = encoder, cache
        self._encoder: TextEncoder | None = None
        for prompt, embedding in self.table.items():
            self._check(prompt, embedding)

    def _check(self, prompt: str, embedding: Tensor) -> None:
        if (
            embedding.ndim != 2
            or embedding.shape[1] != self.text_dim
            or not 0 < len(embedding) <= self.token_length
        ):
            raise PromptError(
                f"embedding of {prompt!r}: expected [1 … {self.token_length}, {self.text_dim}], got {list(embedding.shape)}"
            )

    @property
    def encoder(self) -> TextEncoder:
        """The text encoder, loaded when it is first asked for.

        Raises:
            PromptError: there is none.
        """
        if self._encoder is None:
            if self._load is None:
                raise PromptError("this policy has no text encoder, only its table of prompts")
            self._encoder = self._load()
        return self._encoder

    def drop_encoder(self) -> None:
        """Forget the text encoder; the next unknown prompt loads it again."""
        self._encoder = None

    def add(self, prompts: Iterable[str]) -> None:
        """Encode prompts into the table; those it holds are left as they are.

        Raises:
            PromptError: a prompt is unknown and there is no text encoder.
        """
        for prompt in prompts:
            if prompt in self.table:
                continue
            kept = None if self.cache is None else self.cache.get(prompt)
            if kept is not None:
                self.put(prompt, kept)
                continue
            if self._load is None:
                raise PromptError(
                    f"no embedding of the prompt {prompt!r}, and this checkpoint brings no text encoder; it knows: "
                    f"{'; '.join(map(repr, sorted(self.table)))}. Add one with "
                    f"`policy.add_prompt(prompt, embedding)`, or name an encoder in `text` of config.json"
                )
            self.put(prompt, self.encoder.encode(prompt, self.token_length))
            if self.cache is not None:
                self.cache.put(prompt, self.table[prompt])

    def put(self, prompt: str, embedding: Tensor) -> None:
        """Put an embedding [n, D] into the table."""
        self._check(prompt, embedding)
        self.table[prompt] = embedding.detach()

    def embed(self, prompts: Sequence[str], *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Embeddings of prompts, zero past each one's end: [B, L, D]."""
        self.add(prompts)
        known = (self.table[prompt].to(device, dtype) for prompt in prompts)
        return torch.stack([F.pad(x, (0, 0, 0, self.token_length - len(x))) for x in known])


def untrained_encoder(prompts: Sequence[str], text_dim: int, seed: int) -> TextEncoder:
    """A small UMT5 with seeded random weights and the words of `prompts` as vocabulary.

    It tells prompts apart and says nothing about their meaning: enough where a policy knows a fixed list of instructions.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    words = sorted({word for prompt in prompts for word in prompt.split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    heads = max(1, text_dim // 16)
    config = UMT5Config(
        vocab_size=len(vocabulary),
        d_model=text_dim,
        d_kv=16,
        d_ff=2 * text_dim,
        num_layers=2,
        num_heads=heads,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UMT5EncoderModel(config)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    return TextEncoder(model, fast)
