"""Loads policies from folders, files and the Hub, and writes them there: `from_pretrained` and its
counterparts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch

from wam_policy.config import Form, PolicyConfig, Source
from wam_policy.errors import ConfigError
from wam_policy.hub import checkpoint, checkpoint_forms, frozen_base, load, weights
from wam_policy.hub.download import DownloadOptions
from wam_policy.hub.prompt_cache import PromptCache
from wam_policy.hub.request import CheckpointRequest
from wam_policy.hub.upload import upload_folder
from wam_policy.models.encoders.text import PromptEmbeddings
from wam_policy.models.encoders.vae import VAE
from wam_policy.models.registry import Model
from wam_policy.presets import ReleaseInfo


class HubMixin:
    """Gives a policy the methods that Hugging Face's libraries have for loading and saving."""

    config: PolicyConfig
    model: Model
    prompts: PromptEmbeddings

    def __init__(
        self,
        config: PolicyConfig,
        model: Model,
        *,
        vae: VAE | Callable[[], VAE],
        prompts: PromptEmbeddings,
        engine: Any = None,
    ) -> None:
        """Assemble a policy from its parts; implemented by the policy class."""
        raise NotImplementedError

    @property
    def vae(self) -> VAE:
        """Video codec."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls,
        id_or_folder: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        filename: str | None = None,
        release: ReleaseInfo | None = None,
        stats: str | Path | None = None,
        device: str | torch.device = "cpu",
        text_device: str | torch.device | None = None,
        prompt_cache: str | Path | None = None,
        dtype: torch.dtype | str | None = None,
        mmap: bool = True,
        verify: bool = False,
    ) -> Self:
        """Load a policy from a folder, a file or the Hugging Face Hub.

        Reads checkpoints of this package, LeRobot's `fastwam` folders, and files of the reference
        implementations with those of their run beside them. No code in a file is executed.

        Args:
            id_or_folder: Local folder or file, or Hub id "organisation/name".
            revision: Branch, tag or commit on the Hub.
            cache_dir: Folder of the downloads.
            force_download: Download again what is cached.
            local_files_only: Do not use the network.
            token: Hub token; True takes the stored one.
            filename: File of a reference implementation in a folder or repository of several.
            release: What such a file does not record; None for a known release.
            stats: `dataset_stats.json` of such a file; the default is that of its run.
            device: Device of the policy.
            text_device: Device of the text encoder, if it is needed; the default is `device`.
            prompt_cache: Folder of prompt embeddings; new ones are added.
            dtype: Dtype to compute in (also by name, "bfloat16"); the default is the config's.
            mmap: Leave weights that need no cast in the files; see docs/checkpoints.md.
            verify: Compare all files with the SHA-256 that `save_pretrained` recorded.

        Raises:
            CheckpointError: There is no such checkpoint, its weights do not fit, or it has changed.
            ConfigError: The config is incomplete, inconsistent or of a newer format.
        """
        download = DownloadOptions(revision, cache_dir, force_download, local_files_only, token)
        options = checkpoint.LoadOptions(
            download=download,
            device=torch.device(device),
            text_device=None if text_device is None else torch.device(text_device),
            dtype=_as_dtype(dtype),
            mmap=mmap,
            verify=verify,
        )
        stats_file = None if stats is None else Path(stats)
        request = CheckpointRequest(id_or_folder, filename, release, stats_file)
        parts = load.load_policy(request, options)
        if prompt_cache is not None:
            parts.prompts.cache = PromptCache(Path(prompt_cache), parts.config.prompt.token_length)
        return cls(parts.config, parts.model, vae=parts.vae, prompts=parts.prompts)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        notes: str = "",
        form: Form | None = None,
        base: Source | None = None,
    ) -> Path:
        """Write the policy as a checkpoint folder: config, weights, prompts, codec and card.

        The folder is replaced as a whole: if the process is killed, or the disk is full, it holds
        the old checkpoint or the new one. Several processes that save into one folder wait for
        each other.

        Args:
            folder: Folder to write; created if it does not exist, other files in it stay.
            dtype: Dtype of the stored weights (also by name); the default is their own.
            notes: Markdown for the end of the card, for example results.
            form: What of a Light-WAM to write: every weight ("fat"), the trained weights ("slim"),
                or only what inference needs ("lean"). The default is the form the policy
                was loaded from.
            base: Source of a slim checkpoint's frozen weights, which are downloaded and compared
                with the policy's. The default is the source that the policy's config names.

        Raises:
            ConfigError: The policy does not have this form, a slim one has no base, or the dtype is
                unknown.
            CheckpointError: The base cannot be found or is not this policy's, the dtype cannot
                hold a weight, or the folder cannot be written.
        """
        folder = Path(folder)
        self._write(folder, _as_dtype(dtype), f"path/to/{folder.name}", notes, form, base)
        return folder

    def _write(
        self,
        folder: Path,
        dtype: torch.dtype | None,
        load_by: str,
        notes: str,
        form: Form | None,
        base: Source | None,
    ) -> PolicyConfig:
        """Write a checkpoint folder and return the config in it."""
        parts = checkpoint.PolicyParts(self.config, self.model, lambda: self.vae, self.prompts)
        parts = checkpoint_forms.to_form(parts, form, base, dtype, folder)
        checkpoint.write_checkpoint(folder, parts, dtype=dtype, load_by=load_by, notes=notes)
        return parts.config

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | bool | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload policy",
        create_pr: bool = False,
        dtype: torch.dtype | str | None = None,
        notes: str = "",
        form: Form | None = None,
        base: Source | None = None,
    ) -> str:
        """Upload the policy to the Hub as one commit and return the commit's URL.

        Args:
            repo_id: Repository "organisation/name"; created if it does not exist.
            token: Hub token; the default is the stored one.
            private: Whether a new repository is private.
            revision: Branch to commit to.
            commit_message: First line of the commit message.
            create_pr: Open a pull request instead of committing.
            dtype: As in `save_pretrained`.
            notes: As in `save_pretrained`.
            form: As in `save_pretrained`.
            base: As in `save_pretrained`.

        Raises:
            ConfigError: As `save_pretrained`, or the base is a local folder or the repository
                itself.
            CheckpointError: As `save_pretrained`, or the Hub refuses.
        """
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            config = self._write(folder, _as_dtype(dtype), repo_id, notes, form, base)
            if config.base is not None:
                frozen_base.refuse_unpublished(config.base, repo_id)
            return upload_folder(
                folder,
                repo_id,
                token=token,
                private=private,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
            )


def _as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return a dtype that models compute in, given as such or by its name.

    Raises:
        ConfigError: There is no such dtype, or nothing computes in it.
    """
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if named is not None and named in weights.DTYPES:
        return named
    if dtype is None:
        return None
    names = ", ".join(str(known).removeprefix("torch.") for known in weights.DTYPES)
    raise ConfigError(f"models compute in {names}, not in {dtype!r}")
