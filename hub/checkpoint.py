"""A checkpoint folder: its contract, weights, prompts and codec, read strictly and written atomically."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from wam_policy.config import PolicyConfig
from wam_policy.errors import CheckpointError
from wam_policy.hub import frozen, weights
from wam_policy.hub.atomic import replace_files
from wam_policy.hub.card import card
from wam_policy.hub.locate import Download
from wam_policy.models.fast_wam import FastWAM
from wam_policy.models.layers import PRECISIONS
from wam_policy.models.text import Prompts
from wam_policy.models.vae import VAE

CONFIG = "config.json"
PROMPTS = "prompts"  # prompt -> [n, text_dim]
STALE = tuple(
    f"{stem}*{suffix}"
    for stem in ("model", PROMPTS, f"*/{frozen.VAE_STEM}")
    for suffix in (".safetensors", ".safetensors.index.json")
)


@dataclass(frozen=True)
class Parts:
    """What a policy is made of; the codec is loaded when it is asked for."""

    config: PolicyConfig
    model: FastWAM
    vae: Callable[[], VAE]
    prompts: Prompts


def read_config(folder: Path) -> PolicyConfig:
    """The contract of a checkpoint folder.

    Raises:
        CheckpointError: there is none.
        ConfigError: it can't be right.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {CONFIG}: the download or save is incomplete (do it again), or it is no wam-policy checkpoint"
        )
    try:
        return PolicyConfig.from_json(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} isn't text: {error}") from error


def read(folder: Path, download: Download, *, device: torch.device, dtype: torch.dtype | None) -> Parts:
    """Read a checkpoint folder; `dtype` None takes the contract's."""
    config = read_config(folder)
    dtype = dtype or getattr(torch, config.dtype)
    with torch.device("meta"):
        model = FastWAM(config.model, PRECISIONS[config.precision])
    weights.load(model, folder, dtype=dtype, device=device)
    text = config.text
    prompts = Prompts(
        weights.read(folder, PROMPTS) if (folder / f"{PROMPTS}.safetensors").is_file() else {},
        token_length=config.prompt.token_length,
        text_dim=config.model.text_dim,
        encoder=None if text is None else lambda: frozen.load_text(text, folder, download, dtype=dtype, device=device),
    )
    return Parts(config, model, lambda: frozen.load_vae(config.vae, folder, download, dtype=dtype, device=device), prompts)


def write(folder: Path, parts: Parts, *, dtype: torch.dtype | None, load_by: str, notes: str) -> None:
    """Write a checkpoint folder: config, weights, prompts, card, and the frozen parts that live in no other repository.

    Args:
        folder: where; other files in it stay.
        parts: what to write.
        dtype: what tensors are stored in; None: what they are.
        load_by: the id or folder that the card says to load.
        notes: markdown for the card's end.
    """
    config, prompts = parts.config, parts.prompts
    with replace_files(folder, CONFIG, STALE) as stage:
        weights.write(stage, parts.model.state_dict(), dtype=dtype)
        if prompts.table:
            weights.write(stage, prompts.table, PROMPTS, dtype=dtype)
        if config.vae.repo is None:
            codec, vae = stage / config.vae.subfolder, parts.vae()
            vae.complete()
            vae.model.save_config(codec)
            weights.write(codec, vae.model.state_dict(), frozen.VAE_STEM, dtype=dtype)
        if config.text is not None and config.text.repo is None:
            text = stage / config.text.subfolder
            prompts.encoder.model.save_pretrained(text / frozen.TEXT_ENCODER)
            prompts.encoder.tokenizer.save_pretrained(text / frozen.TOKENIZER)
        (stage / "README.md").write_text(card(config, load_by=load_by, notes=notes))
        (stage / CONFIG).write_text(config.to_json())
