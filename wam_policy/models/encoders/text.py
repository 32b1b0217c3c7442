"""Prompt embeddings: a table of known prompts, and transformers' UMT5 encoder for new ones.

Rows past a prompt's end are exactly zero and take part in attention, as in the training of the
released weights. See docs/method.md, "Encoders".
"""

# B prompts, n tokens of a prompt, L rows of a padded prompt, D text width

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F  # noqa: N812  # PyTorch's own name for it
from torch import Tensor

from wam_policy.errors import PromptError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, UMT5EncoderModel


class TextEncoder:
    """A UMT5 encoder and its tokenizer."""

    def __init__(
        self,
        model: UMT5EncoderModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        clean: bool = True,
    ) -> None:
        """Combine an encoder and its tokenizer.

        Args:
            model: Encoder.
            tokenizer: Its tokenizer.
            clean: Clean prompts before they are embedded (see `clean_prompt`).
        """
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.clean = clean

    @torch.no_grad()
    def encode(self, prompt: str, token_length: int) -> Tensor:
        """Embed one prompt.

        Args:
            prompt: Text to embed.
            token_length: Maximum number of tokens; further ones are cut off.

        Returns:
            [n, D], including the end-of-sequence token.
        """
        text = clean_prompt(prompt) if self.clean else prompt
        tokens = self.tokenizer(
            text,
            max_length=token_length,
            truncation=True,
            return_tensors="pt",
        )
        device = self.model.device
        output = self.model(
            input_ids=tokens["input_ids"].to(device),
            attention_mask=tokens["attention_mask"].to(device),
        )
        return output.last_hidden_state[0]


def clean_prompt(prompt: str) -> str:
    """Return a prompt as the reference implementations tokenise it.

    HTML entities are replaced, twice because some data are escaped twice, and white space is
    collapsed to single spaces.

    Source: `wan/modules/tokenizers.py` in https://github.com/Wan-Video/Wan2.2, without its repair
    of wrongly decoded text.
    """
    unescaped = html.unescape(html.unescape(prompt))
    return re.sub(r"\s+", " ", unescaped).strip()


class EmbeddingStore(Protocol):
    """A cache of prompt embeddings that is shared between processes."""

    def get(self, prompt: str) -> Tensor | None:
        """Return the embedding [n, D] of a prompt; None: it is not cached."""

    def put(self, prompt: str, embedding: Tensor) -> None:
        """Store the embedding [n, D] of a prompt."""


class PromptEmbeddings:
    """A table of prompt embeddings, extended by a text encoder where there is one."""

    def __init__(
        self,
        table: dict[str, Tensor],
        *,
        token_length: int,
        text_dim: int,
        load_encoder: Callable[[], TextEncoder] | None = None,
        cache: EmbeddingStore | None = None,
    ) -> None:
        """Create a table.

        Args:
            table: Embeddings [n, D] of known prompts.
            token_length: Rows L that every prompt is padded to.
            text_dim: Width D.
            load_encoder: Function that loads the text encoder, called for the first unknown prompt;
                None: there is none.
            cache: Store that is searched before a prompt is encoded, and receives new embeddings.
        """
        self.table = dict(table)
        self.token_length = token_length
        self.text_dim = text_dim
        self.cache = cache
        self._load_encoder = load_encoder
        self._encoder: TextEncoder | None = None
        for prompt, embedding in self.table.items():
            self._check(prompt, embedding)

    def _check(self, prompt: str, embedding: Tensor) -> None:
        """Check that an embedding is [n, D] of floats, with n from 1 to the padded length."""
        valid = embedding.ndim == 2 and embedding.shape[1] == self.text_dim
        if not valid or not 0 < len(embedding) <= self.token_length:
            raise PromptError(
                f"embedding of {prompt!r}: expected [1 … {self.token_length}, {self.text_dim}] "
                f"(tokens, width), got {list(embedding.shape)}"
            )
        if not embedding.is_floating_point():
            raise PromptError(
                f"embedding of {prompt!r}: expected floating numbers, got {embedding.dtype}"
            )

    @property
    def encoder(self) -> TextEncoder:
        """Text encoder, loaded on first use.

        Raises:
            PromptError: There is no text encoder.
        """
        if self._encoder is None:
            if self._load_encoder is None:
                raise PromptError(
                    "this policy has a table of prompts, but no text encoder; add embeddings with "
                    "`policy.add_prompt(prompt, embedding)`"
                )
            self._encoder = self._load_encoder()
        return self._encoder

    def drop_encoder(self) -> None:
        """Release the text encoder; the next unknown prompt loads it again."""
        self._encoder = None

    def add(self, prompts: Iterable[str]) -> None:
        """Add prompts to the table, from the cache or by encoding them; known ones are skipped.

        Raises:
            PromptError: A prompt is unknown and there is no text encoder.
        """
        for prompt in prompts:
            if prompt in self.table:
                continue

            cached = None if self.cache is None else self.cache.get(prompt)
            if cached is not None:
                self.put(prompt, cached)
                continue

            if self._load_encoder is None:
                known = "; ".join(repr(name) for name in sorted(self.table))
                raise PromptError(
                    f"no embedding of the prompt {prompt!r}, and this checkpoint has no text "
                    f"encoder; known prompts: {known}. Add an embedding with "
                    f"`policy.add_prompt(prompt, embedding)`, or name an encoder under `text` in "
                    f"config.json"
                )
            self.put(prompt, self.encoder.encode(prompt, self.token_length))
            if self.cache is not None:
                self.cache.put(prompt, self.table[prompt])

    def put(self, prompt: str, embedding: Tensor) -> None:
        """Set the embedding [n, D] of a prompt.

        Raises:
            PromptError: The embedding has another shape or dtype, or is not finite.
        """
        self._check(prompt, embedding)
        if not embedding.isfinite().all():
            raise PromptError(
                f"embedding of {prompt!r} is not finite: the text encoder is damaged, or its dtype "
                f"is too small; embed the prompt again"
            )
        # A copy: tensors that share memory, as those of one batch do, cannot be saved.
        self.table[prompt] = embedding.detach().clone()

    def embed(self, prompts: Sequence[str], *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the padded embeddings of prompts.

        Args:
            prompts: Prompts to embed; unknown ones are added to the table.
            device: Device of the result.
            dtype: Type of the result.

        Returns:
            [B, L, D], zero past each prompt's end.

        Raises:
            PromptError: A prompt is unknown and there is no text encoder.
        """
        self.add(prompts)
        padded = []
        for prompt in prompts:
            embedding = self.table[prompt].to(device, dtype)
            padding = self.token_length - len(embedding)
            padded.append(F.pad(embedding, (0, 0, 0, padding)))
        return torch.stack(padded)


def untrained_encoder(prompts: Sequence[str], text_dim: int, seed: int) -> TextEncoder:
    """Build a small UMT5 with random weights and a vocabulary of the prompts' words.

    Its embeddings tell prompts apart but carry no meaning. That suffices for a policy with a fixed
    list of instructions.

    Args:
        prompts: Prompts whose words form the vocabulary.
        text_dim: Width D.
        seed: Seed of the weights.
    """
    from transformers import UMT5Config, UMT5EncoderModel

    words = sorted({word for prompt in prompts for word in prompt.split()})
    tokens = ["<pad>", "</s>", "<unk>", *words]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    config = UMT5Config(
        vocab_size=len(vocabulary),
        d_model=text_dim,
        d_kv=16,
        d_ff=2 * text_dim,
        num_layers=2,
        num_heads=max(1, text_dim // 16),
    )

    # The caller's random state is restored afterwards. `torch.manual_seed` would also reseed the
    # generators of CUDA devices.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = UMT5EncoderModel(config)
    return TextEncoder(model, _word_tokenizer(vocabulary))


def _word_tokenizer(vocabulary: dict[str, int]) -> PreTrainedTokenizerBase:
    """Build a tokenizer that splits at white space and appends the end-of-sequence token.

    Args:
        vocabulary: Index of each token, including those for padding, end of sequence and unknown.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )
