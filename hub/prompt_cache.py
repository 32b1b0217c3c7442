"""A folder of prompt embeddings, so that each prompt needs the text encoder only once.

Files are named by the prompt's SHA-256 and the padded length. Cache files of the reference
implementations (`<sha256>.t5_len128.<encoder>.pt`) are read too. See docs/method.md, "Encoders".
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from wam_policy.errors import PromptError
from wam_policy.hub.foreign.pickles import read_pickle
from wam_policy.utils.io import explained_write_errors, write_bytes

# Name of the tensor in a file.
NAME = "embedding"


class PromptCache:
    """Prompt embeddings of one text encoder; every encoder needs a folder of its own."""

    def __init__(self, folder: Path, token_length: int) -> None:
        """Open a cache.

        Args:
            folder: Folder of the embeddings; it is created by the first `put`.
            token_length: Number of tokens to which prompts are padded or cut.
        """
        self.folder = folder
        self.token_length = token_length

    def _stem(self, prompt: str) -> str:
        """Return the beginning of the file name of a prompt."""
        sha256 = hashlib.sha256(prompt.encode()).hexdigest()
        return f"{sha256}.t5_len{self.token_length}"

    def get(self, prompt: str) -> Tensor | None:
        """Return the embedding [n, D] of a prompt's n tokens; None if it is not cached.

        Raises:
            PromptError: The file is broken.
        """
        stem = self._stem(prompt)
        native = self.folder / f"{stem}.safetensors"
        reference = sorted(self.folder.glob(f"{stem}.*.pt"))
        is_native = native.is_file()
        if not is_native and not reference:
            return None

        path = native if is_native else reference[0]
        try:
            embedding = load_file(path)[NAME] if is_native else _read_reference(path)
        except (
            SafetensorError,
            OSError,
            LookupError,
            AttributeError,
            TypeError,
            ValueError,
            RuntimeError,
        ) as error:
            raise PromptError(f"{path} is broken, remove it: {error!s:.300}") from error
        if not embedding.is_floating_point() or not embedding.isfinite().all():
            raise PromptError(f"{path} is broken, remove it: its numbers are not finite")
        return embedding

    def put(self, prompt: str, embedding: Tensor) -> None:
        """Store the embedding [n, D] of a prompt."""
        with explained_write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {NAME: embedding.detach().cpu().contiguous()}
        data = save(tensors, metadata={"prompt": prompt})
        write_bytes(self.folder / f"{self._stem(prompt)}.safetensors", data)


def _read_reference(path: Path) -> Tensor:
    """Return the embedding [n, D] in a cache file of a reference implementation."""
    content = read_pickle(path)

    # The rows of padding tokens are not zero in these files.
    embedding: Tensor = content["context"][content["mask"].bool()]
    return embedding
