"""Loads the frozen parts a checkpoint names: its video codec and its text encoder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError

from wam_policy.config import Source
from wam_policy.errors import CheckpointError
from wam_policy.hub import weights
from wam_policy.hub.download import PATTERNS, DownloadOptions, resolve_folder
from wam_policy.models.encoders.text import TextEncoder
from wam_policy.models.encoders.vae import VAE, build_vae

VAE_STEM = "diffusion_pytorch_model"  # diffusers' file name
ENCODER, DECODER = ("encoder.", "quant_conv."), ("decoder.", "post_quant_conv.")
TEXT_ENCODER, TOKENIZER = "text_encoder", "tokenizer"  # diffusers' folder names


def component_folder(
    source: Source, checkpoint: Path, download: DownloadOptions, parts: tuple[str, ...] = ("",)
) -> Path:
    """The local folder of a frozen part, of which only the folders `parts` are needed."""
    if source.repo is None:
        return checkpoint / source.subfolder
    folders = [str(PurePosixPath(source.subfolder, part)) for part in parts]
    patterns = [
        pattern if folder == "." else f"{folder}/{pattern}"
        for folder in folders
        for pattern in PATTERNS
    ]
    return (
        resolve_folder(source.repo, replace(download, revision=source.revision), patterns)
        / source.subfolder
    )


def load_vae(
    source: Source,
    checkpoint: Path,
    download: DownloadOptions,
    *,
    dtype: torch.dtype,
    device: torch.device,
    encoder_only: bool = False,
) -> VAE:
    """The video codec, from a folder in diffusers' layout, strictly; its decoder is read when it is first used.

    Of a lean checkpoint's own codec there is the encoder only; one of another place may be whole.

    On CPUs without instructions for short floats it computes in float32: their convolutions take minutes a picture there.
    """
    if device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        dtype = torch.float32
    place = component_folder(source, checkpoint, download)
    try:
        config = json.loads((place / "config.json").read_text(encoding="utf-8"))
        with torch.device("meta"):
            model = build_vae(config).model.eval().requires_grad_(False)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"no video codec in {place}: {error}") from error
    whole = not encoder_only or any(
        name.startswith(DECODER) for name in weights.read_weights(place, VAE_STEM)
    )

    def load(only: tuple[str, ...]) -> None:
        if only == DECODER and not whole:
            raise CheckpointError(
                f"the codec in {place} has no decoder: a lean checkpoint only acts; load the fat or slim one"
            )
        holds = ("",) if whole else ENCODER
        weights.load_weights(
            model, place, VAE_STEM, dtype=dtype, device=device, only=only, holds=holds
        )

    load(ENCODER)
    vae = VAE(
        model, lambda: load(DECODER)
    )  # its statistics come from the config: they were not on the meta device
    vae.mean, vae.std = vae.mean.to(device), vae.std.to(device)
    return vae


def load_text(
    source: Source,
    checkpoint: Path,
    download: DownloadOptions,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> TextEncoder:
    """The text encoder and its tokenizer, from a folder in transformers' layout (`text_encoder/`, `tokenizer/`)."""
    from transformers import AutoTokenizer, UMT5EncoderModel

    root = component_folder(source, checkpoint, download, (TEXT_ENCODER, TOKENIZER))
    try:
        model, report = UMT5EncoderModel.from_pretrained(
            root / TEXT_ENCODER,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(root / TOKENIZER, local_files_only=True)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"no text encoder in {root}: {error}") from error
    if report["missing_keys"] or report["unexpected_keys"]:
        raise CheckpointError(f"text encoder in {root} doesn't fit: {report}")
    return TextEncoder(model.to(device), tokenizer)
