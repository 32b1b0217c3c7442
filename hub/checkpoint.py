"""A checkpoint folder: its contract, weights, prompts and codec, read strictly and written atomically."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wam_policy.config import PolicyConfig
from wam_policy.errors import CheckpointError
from wam_policy.hub import components, frozen_base, weights
from wam_policy.hub.card import render_card
from wam_policy.hub.download import DownloadOptions
from wam_policy.models.encoders.text import PromptEmbeddings
from wam_policy.models.encoders.vae import VAE
from wam_policy.models.layers.precision import PRECISIONS
from wam_policy.models.light_wam.model import is_trainable
from wam_policy.models.registry import Model, build_model
from wam_policy.utils.io import replace_files

CONFIG = "config.json"
BASE = "base.json"  # in its place, where a folder holds only parts of a policy
PROMPTS = "prompts"  # prompt -> [n, text_dim]
STALE = tuple(
    f"{stem}*{suffix}"
    for stem in ("model", PROMPTS, f"*/{components.VAE_STEM}")
    for suffix in (".safetensors", ".safetensors.index.json")
)


@dataclass(frozen=True)
class PolicyParts:
    """What a policy is made of; the codec is loaded when it is asked for."""

    config: PolicyConfig
    model: Model
    vae: Callable[[], VAE]
    prompts: PromptEmbeddings


def is_native(folder: Path) -> bool:
    """Whether a folder is of this package's format, whole or parts only, by what its config says."""
    if (folder / BASE).is_file():
        return True
    try:
        return "format_version" in json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def read_config(folder: Path) -> PolicyConfig:
    """The contract of a checkpoint folder.

    Raises:
        CheckpointError: there is none.
        ConfigError: it can't be right.
    """
    path = folder / CONFIG
    if (folder / BASE).is_file():
        raise CheckpointError(
            f"{folder} holds only parts of a policy, to train from: wam train --pretrained-path {folder}"
        )
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {CONFIG}: the download or save is incomplete (do it again), or it is no wam-policy checkpoint; "
            f"of a repository of loose files say which one, `filename=…`"
        )
    try:
        return PolicyConfig.from_json(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} isn't text: {error}") from error


def read_checkpoint(
    folder: Path,
    download: DownloadOptions,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    text_device: torch.device | None = None,
) -> PolicyParts:
    """Read a checkpoint folder of our own format.

    Args:
        folder: the folder.
        download: how frozen parts that live elsewhere are fetched.
        device: where the model goes.
        dtype: what it computes in; None: the contract's.
        text_device: where the text encoder goes; None: `device`.
    """
    config = read_config(folder)
    model = empty_model(config)
    dtype = dtype or getattr(torch, config.dtype)
    if config.base is None:
        weights.load_weights(model, folder, dtype=dtype, device=device)
    else:
        weights.assign_weights(
            model, checkpoint_tensors(folder, download), str(folder), dtype=dtype, device=device
        )
    table = (
        weights.read_weights(folder, PROMPTS)
        if (folder / f"{PROMPTS}.safetensors").is_file()
        else {}
    )
    return assemble(config, model, table, folder, download, text_device=text_device or device)


def checkpoint_tensors(folder: Path, download: DownloadOptions) -> dict[str, Tensor]:
    """The weights of a checkpoint folder or of a folder of parts, a slim one's frozen ones among them; mapped, not yet read.

    Raises:
        CheckpointError: they can't be read, or a slim one's base can't be found or is another.
    """
    own = weights.read_weights(folder)
    if (folder / BASE).is_file() or (config := read_config(folder)).base is None:
        return own
    expected = empty_model(config).state_dict()
    weights.check_fit(
        own, {name: x for name, x in expected.items() if is_trainable(name)}, str(folder)
    )
    rest = {name: x for name, x in expected.items() if not is_trainable(name)}
    return own | {
        name: x.to(next(iter(own.values())).dtype)
        for name, x in frozen_base.read_base_weights(config.base, rest, folder, download).items()
    }


def empty_model(config: PolicyConfig) -> Model:
    """The model of a contract, without weights, on the `meta` device."""
    with torch.device("meta"):
        return build_model(config.model, PRECISIONS[config.precision])


def assemble(
    config: PolicyConfig,
    model: Model,
    table: dict[str, Tensor],
    folder: Path,
    download: DownloadOptions,
    *,
    text_device: torch.device,
) -> PolicyParts:
    """Put the frozen parts, which are loaded when they are asked for, beside a loaded model."""
    weight = next(model.parameters())
    device, dtype, text = weight.device, weight.dtype, config.text
    prompts = PromptEmbeddings(
        table,
        token_length=config.prompt.token_length,
        text_dim=config.model.text_dim,
        encoder=None
        if text is None
        else lambda: components.load_text(text, folder, download, dtype=dtype, device=text_device),
    )

    def codec() -> VAE:
        encoder_only = config.form == "lean"
        return components.load_vae(
            config.vae, folder, download, dtype=dtype, device=device, encoder_only=encoder_only
        )

    return PolicyParts(config, model, codec, prompts)


def write_checkpoint(
    folder: Path, parts: PolicyParts, *, dtype: torch.dtype | None, load_by: str, notes: str
) -> None:
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
        held = parts.model.state_dict()
        weights.write_weights(
            stage,
            {name: x for name, x in held.items() if config.base is None or is_trainable(name)},
            dtype=dtype,
        )
        if prompts.table:
            weights.write_weights(stage, prompts.table, PROMPTS, dtype=dtype)
        if config.vae.repo is None:
            codec, vae = stage / config.vae.subfolder, parts.vae()
            needed = components.ENCODER if config.form == "lean" else ("",)
            if config.form != "lean":
                vae.load_decoder()
            vae.model.save_config(codec)
            held = {
                name: x for name, x in vae.model.state_dict().items() if name.startswith(needed)
            }
            weights.write_weights(codec, held, components.VAE_STEM, dtype=dtype)
        if config.text is not None and config.text.repo is None:
            text = stage / config.text.subfolder
            prompts.encoder.model.save_pretrained(text / components.TEXT_ENCODER)
            prompts.encoder.tokenizer.save_pretrained(text / components.TOKENIZER)
        (stage / "README.md").write_text(render_card(config, load_by=load_by, notes=notes))
        (stage / CONFIG).write_text(config.to_json())
