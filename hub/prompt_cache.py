"""A folder of prompt embeddings, so that the text encoder is needed once per prompt and then never again.

A file is named by the prompt's SHA-256 and the padded length. The reference implementations' own cache files
(`<sha256>.t5_len128.<encoder>.pt`) are read too. Source: spec/fastwam.md section 4.3, spec/lightwam.md section 4.3.
"""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from wam_policy.errors import PromptError
from wam_policy.utils.io import write_bytes

NAME = "embedding"


class PromptCache:
    """Embeddings by prompt, of one text encoder: give another encoder another folder."""

    def __init__(self, folder: Path, token_length: int) -> None:
        self.folder, self.token_length = folder, token_length

    def _stem(self, prompt: str) -> str:
        return f"{hashlib.sha256(prompt.encode()).hexdigest()}.t5_len{self.token_length}"

    def get(self, prompt: str) -> Tensor | None:
        """The embedding [n, D] of a prompt's n tokens; None: it isn't there.

        Raises:
            PromptError: a file that is broken.
        """
        own = self.folder / f"{self._stem(prompt)}.safetensors"
        foreign = sorted(self.folder.glob(f"{self._stem(prompt)}.*.pt"))
        try:
            if own.is_file():
                return load_file(own)[NAME]
            if foreign:
                found = torch.load(foreign[0], weights_only=True, map_location="cpu")
                return found["context"][
                    found["mask"].bool()
                ]  # rows of padding aren't zero in these files
        except (
            SafetensorError,
            OSError,
            KeyError,
            TypeError,
            RuntimeError,
            EOFError,
            pickle.UnpicklingError,
        ) as error:
            raise PromptError(
                f"{own if own.is_file() else foreign[0]} is broken, remove it: {error}"
            ) from error
        return None

    def put(self, prompt: str, embedding: Tensor) -> None:
        """Keep an embedding [n, D]."""
        self.folder.mkdir(parents=True, exist_ok=True)
        data = save({NAME: embedding.detach().cpu().contiguous()}, metadata={"prompt": prompt})
        write_bytes(self.folder / f"{self._stem(prompt)}.safetensors", data)
