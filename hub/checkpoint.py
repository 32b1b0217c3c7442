"""Checkpoint folders of this package, which are read strictly and written atomically.

A folder holds the configuration, the model's weights, prompt embeddings, a card, and those frozen
encoders that no other repository provides. See docs/method.md, "Checkpoint formats".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wam_policy.config import PolicyConfig
from wam_policy.errors import CheckpointError, ConfigError, WAMPolicyError
from wam_policy.hub import checksums, components, frozen_base, weights
from wam_policy.hub.card import render_card
from wam_policy.hub.download import DownloadOptions
from wam_policy.models.encoders.text import PromptEmbeddings, TextEncoder
from wam_policy.models.encoders.vae import VAE
from wam_policy.models.layers.precision import PRECISIONS
from wam_policy.models.light_wam.model import is_trainable
from wam_policy.models.registry import Model, build_model
from wam_policy.utils import documents
from wam_policy.utils.io import read_consistently, replace_files, version

CONFIG = "config.json"

# Takes the place of CONFIG in a folder that holds only parts of a policy.
PARTS_CONFIG = "base.json"

# Stem of the file of prompt embeddings: prompt -> [n, text_dim].
PROMPTS = "prompts"

# Files of an older checkpoint that a new one removes if it does not replace them.
STALE = tuple(
    f"{stem}*{suffix}"
    for stem in ("model", PROMPTS, f"*/{components.VAE_STEM}")
    for suffix in (".safetensors", ".safetensors.index.json")
)


@dataclass(frozen=True)
class PolicyParts:
    """The parts of a policy."""

    config: PolicyConfig
    model: Model

    # Loads the video VAE; called at first use.
    vae: Callable[[], VAE]

    prompts: PromptEmbeddings


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a policy is loaded."""

    # Of the checkpoint, and of frozen weights that are stored elsewhere.
    download: DownloadOptions = field(default_factory=DownloadOptions)

    # Of the model and the video VAE.
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    # Of the text encoder; None for `device`.
    text_device: torch.device | None = None

    # Of the model; None for that of the configuration.
    dtype: torch.dtype | None = None

    # Leave weights that need no cast in the mapped files; False copies them into memory.
    mmap: bool = True

    # Compare the files with their recorded SHA-256 first.
    verify: bool = False


def is_native(folder: Path) -> bool:
    """Return whether a folder has this package's format: a policy, or parts of one.

    Args:
        folder: Existing folder; only its configuration is read.
    """
    if (folder / PARTS_CONFIG).is_file():
        return True
    try:
        config = documents.read_json_object(folder / CONFIG, CheckpointError, "")
    except CheckpointError:
        return False
    return "format_version" in config


def read_config(folder: Path) -> PolicyConfig:
    """Read the configuration of a checkpoint folder.

    Raises:
        CheckpointError: The folder has no configuration.
        ConfigError: The configuration is invalid.
    """
    path = folder / CONFIG
    if (folder / PARTS_CONFIG).is_file():
        raise CheckpointError(
            f"{folder} holds only parts of a policy, to train from; "
            f"run wam train --pretrained-path {folder}"
        )
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {CONFIG}: the download or save is incomplete (repeat it), or the "
            f"folder is not a wam-policy checkpoint; in a repository of single files, name the "
            f"file with `filename=…`"
        )
    text = documents.read_text(path, CheckpointError, "download it again")
    try:
        return PolicyConfig.from_json(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def read_checkpoint(folder: Path, options: LoadOptions) -> PolicyParts:
    """Read a checkpoint folder of this package's format; all of it is of one version.

    Args:
        folder: Folder of the checkpoint.
        options: How it is loaded.

    Returns:
        The parts of the policy; the frozen encoders are loaded at first use.

    Raises:
        CheckpointError: Files are missing, unreadable, changed, or do not match the configuration.
        ConfigError: The configuration is invalid.
    """

    def read() -> PolicyParts:
        """Read the folder once."""
        if options.verify:
            checksums.verify(folder)
        config = read_config(folder)
        model = empty_model(config)
        load: dict[str, Any] = {
            "dtype": options.dtype or getattr(torch, config.dtype),
            "device": options.device,
            "mmap": options.mmap,
        }
        if config.base is None:
            weights.load_weights(model, folder, **load)
        else:
            tensors = checkpoint_tensors(folder, options.download)
            weights.assign_weights(model, tensors, str(folder), **load)
        return assemble(config, model, _read_prompts(folder, config), folder, options)

    return read_consistently(folder, CONFIG, read)


def _read_prompts(folder: Path, config: PolicyConfig) -> dict[str, Tensor]:
    """Return the known prompt embeddings of a checkpoint, by prompt.

    Raises:
        CheckpointError: There are none and no text encoder either, or they are no finite numbers.
    """
    is_file = (folder / f"{PROMPTS}.safetensors").is_file()
    if not is_file and not weights.index_path(folder, PROMPTS).is_file():
        if config.text is None:
            raise CheckpointError(
                f"{folder} has neither {PROMPTS}.safetensors nor a text encoder: no instruction "
                f"could be followed; download it again"
            )
        return {}
    embeddings = weights.read_weights(folder, PROMPTS)
    what = str(folder / PROMPTS)
    weights.check_dtype(embeddings, what)
    weights.check_finite(embeddings.items(), what)
    return embeddings


def checkpoint_tensors(folder: Path, download: DownloadOptions) -> dict[str, Tensor]:
    """Return the weights of a checkpoint folder, or of a folder with parts of a policy.

    Args:
        folder: Folder of the checkpoint.
        download: Options for the download of a slim checkpoint's frozen weights.

    Returns:
        Tensors by name, memory-mapped where possible; a slim checkpoint's frozen weights are
        included.

    Raises:
        CheckpointError: Weights are unreadable, or a slim checkpoint's base is missing or holds
            other weights.
    """
    tensors = weights.read_weights(folder)
    if (folder / PARTS_CONFIG).is_file():
        return tensors
    config = read_config(folder)
    if config.base is None:
        return tensors

    # A slim checkpoint must hold exactly the trainable weights of its model.
    expected = empty_model(config).state_dict()
    trainable = {name: x for name, x in expected.items() if is_trainable(name)}
    weights.check_fit(tensors, trainable, str(folder))

    # The frozen weights come from the base, in the dtype of the trained ones.
    dtype = next(iter(tensors.values())).dtype
    frozen = {name: x for name, x in expected.items() if not is_trainable(name)}
    base = frozen_base.read_base_weights(config.base, frozen, folder, download)
    return tensors | {name: x.to(dtype) for name, x in base.items()}


def empty_model(config: PolicyConfig) -> Model:
    """Return the model of a configuration on the `meta` device, without weights."""
    try:
        with torch.device("meta"):
            return build_model(config.model, PRECISIONS[config.precision])
    except WAMPolicyError:
        raise
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise ConfigError(f"no model has the sizes of `model` in {CONFIG}: {error}") from error


def assemble(
    config: PolicyConfig,
    model: Model,
    table: dict[str, Tensor],
    folder: Path,
    options: LoadOptions,
) -> PolicyParts:
    """Combine a loaded model with its frozen encoders, which are loaded at first use.

    Args:
        config: Configuration of the policy.
        model: Model with weights; the video VAE is loaded to its device and dtype.
        table: Known prompt embeddings [n, text_dim] by prompt.
        folder: Folder of the checkpoint.
        options: How the encoders are loaded.

    Returns:
        The parts of the policy.
    """
    weight = next(model.parameters())

    # Partial functions instead of local ones: a policy can be pickled.
    check_unchanged = partial(_check_unchanged, folder, version(folder, CONFIG))
    load_vae = partial(
        components.load_vae,
        config.vae,
        folder,
        options.download,
        dtype=weight.dtype,
        device=weight.device,
        encoder_only=config.form == "lean",
        mmap=options.mmap,
        check_unchanged=check_unchanged,
    )
    load_encoder = None
    if config.text is not None:
        load_encoder = partial(
            components.load_text,
            config.text,
            folder,
            options.download,
            dtype=weight.dtype,
            device=options.text_device or options.device,
            clean=config.prompt.clean,
            check_unchanged=check_unchanged,
        )
    prompts = PromptEmbeddings(
        table,
        token_length=config.prompt.token_length,
        text_dim=config.model.text_dim,
        load_encoder=load_encoder,
    )
    return PolicyParts(config, model, load_vae, prompts)


def _check_unchanged(folder: Path, loaded: tuple[int, ...] | None) -> None:
    """Check that a checkpoint is still the one whose weights were loaded.

    Args:
        folder: Folder of the checkpoint.
        loaded: Its version then.

    Raises:
        CheckpointError: Another one has taken its place.
    """
    if version(folder, CONFIG) != loaded:
        raise CheckpointError(
            f"{folder} was replaced after this policy was loaded, so its encoders may be another "
            f"policy's: load it again"
        )


def write_checkpoint(
    folder: Path, parts: PolicyParts, *, dtype: torch.dtype | None, load_by: str, notes: str
) -> None:
    """Write a checkpoint folder; frozen encoders that another repository provides are left out.

    Args:
        folder: Folder to write; files in it that are not a checkpoint's stay.
        parts: Parts of the policy.
        dtype: Dtype in which tensors are stored; None keeps their own.
        load_by: Hub id or folder that the card's example loads.
        notes: Markdown for the end of the card.

    Raises:
        CheckpointError: The folder cannot be written, or the dtype cannot hold a weight; what was
            in the folder before is unchanged.
    """
    config = parts.config
    with replace_files(folder, CONFIG, STALE) as stage:
        # A slim checkpoint, which names a base, leaves the frozen weights out.
        state = parts.model.state_dict()
        stored = {name: x for name, x in state.items() if config.base is None or is_trainable(name)}
        weights.write_weights(stage, stored, dtype=dtype)
        if parts.prompts.table:
            weights.write_weights(stage, parts.prompts.table, PROMPTS, dtype=dtype)

        # Encoders of another repository are not copied.
        if config.vae.repo is None:
            _write_vae(stage / config.vae.subfolder, parts, dtype)
        if config.text is not None and config.text.repo is None:
            _write_text_encoder(stage / config.text.subfolder, parts.prompts.encoder)

        card = render_card(config, load_by=load_by, notes=notes)
        (stage / "README.md").write_text(card, encoding="utf-8")
        (stage / CONFIG).write_text(config.to_json(), encoding="utf-8")
        checksums.write(stage)


def _write_vae(folder: Path, parts: PolicyParts, dtype: torch.dtype | None) -> None:
    """Write the video VAE of a policy in diffusers' layout; for a lean one, the encoder only."""
    vae = parts.vae()
    prefixes: tuple[str, ...] = components.ENCODER
    if parts.config.form != "lean":
        prefixes = ("",)
        vae.load_decoder()

    vae.model.save_config(folder)
    state = vae.model.state_dict()
    stored = {name: tensor for name, tensor in state.items() if name.startswith(prefixes)}
    weights.write_weights(folder, stored, components.VAE_STEM, dtype=dtype)


def _write_text_encoder(folder: Path, encoder: TextEncoder) -> None:
    """Write a text encoder and its tokenizer in transformers' layout, in the encoder's dtype."""
    encoder.model.save_pretrained(folder / components.TEXT_ENCODER)
    encoder.tokenizer.save_pretrained(folder / components.TOKENIZER)
