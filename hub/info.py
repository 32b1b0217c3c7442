"""`wam info`: what a checkpoint is and what it needs to run, without loading its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from tyro.conf import Positional

from wam_policy.config import PolicyConfig, Source
from wam_policy.errors import CheckpointError
from wam_policy.hub import checkpoint, checksums, components, load, request, weights
from wam_policy.hub.card import contract_rows
from wam_policy.hub.download import DownloadOptions, resolve_folder
from wam_policy.hub.foreign import contracts, lerobot_config
from wam_policy.utils import documents


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """Description of a checkpoint: its configuration, its size, and what it needs to run."""

    src: Positional[str]
    """Folder, file or Hub id."""
    filename: str | None = None
    """File to read, in a folder or Hub repository of several."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    verify: bool = False
    """Compare all files of a checkpoint with the SHA-256 that were recorded when it was saved."""


def info(config: InfoConfig, console: Console | None = None) -> dict[str, str]:
    """Print and return what a checkpoint is.

    For a Hub repository of this package's format, only the small files are downloaded.

    Args:
        config: Checkpoint to describe.
        console: Console to print to; None for the standard output.

    Returns:
        Descriptions by aspect, as printed.

    Raises:
        CheckpointError: The checkpoint is missing or unreadable.
        ConfigError: Its configuration is invalid.
    """
    download = DownloadOptions(revision=config.revision)
    rows = _describe(request.CheckpointRequest(config.src, config.filename), download)
    if config.verify:
        folder = resolve_folder(config.src, download)
        rows["Verified"] = f"{checksums.verify(folder)} files by {checksums.SUMS}"
    table = Table(show_header=False)
    for aspect, text in rows.items():
        # Text of the checkpoint is printed literally: brackets in it are no markup.
        table.add_row(aspect, Text(text))
    (console or Console()).print(table)
    return rows


def _describe(
    checkpoint_request: request.CheckpointRequest, download: DownloadOptions
) -> dict[str, str]:
    """Describe a checkpoint of any format."""
    if (
        checkpoint_request.filename is None
        and not Path(checkpoint_request.source).expanduser().is_file()
    ):
        folder = resolve_folder(
            checkpoint_request.source,
            download,
            ["*.json", "*.md", f"{checkpoint.PROMPTS}.safetensors"],
        )
        if (folder / checkpoint.PARTS_CONFIG).is_file():
            return _describe_parts(folder)
        if checkpoint.is_native(folder):
            return _describe_native(folder)

        # Refuse other LeRobot policies before their weights are downloaded.
        if (folder / checkpoint.CONFIG).is_file():
            lerobot_config.is_lerobot(folder)
    return _describe_foreign(checkpoint_request, download)


def _describe_native(folder: Path) -> dict[str, str]:
    """Describe a checkpoint of this package's format."""
    config = checkpoint.read_config(folder)
    model = checkpoint.empty_model(config)
    rows = {
        "Format": f"wam-policy, version {config.format_version}",
        "Parameters": _count_by_module(model.state_dict()),
    }

    path = folder / f"{checkpoint.PROMPTS}.safetensors"
    prompts: dict[str, Tensor] = {}
    if path.is_file():
        prompts = weights.read_weights_file(path)
    return rows | _describe_config(config, folder, prompts)


def _describe_parts(folder: Path) -> dict[str, str]:
    """Describe a folder that holds parts of a policy."""
    path = folder / checkpoint.PARTS_CONFIG
    cure = "convert the part again"
    parts_config = documents.read_json_object(path, CheckpointError, cure)
    with documents.explained(path, CheckpointError, cure):
        sizes = [f"{name} {size}" for name, size in parts_config["sizes"].items()]
    return {
        "Format": "wam-policy, parts to train from",
        "Sizes": ", ".join(sizes),
        "To use it": f"wam train --pretrained-path {folder}",
    }


def _describe_foreign(
    checkpoint_request: request.CheckpointRequest, download: DownloadOptions
) -> dict[str, str]:
    """Describe a file or folder of another project, which is downloaded whole."""
    path = checkpoint_request.locate(download)
    foreign = load.read_foreign(path)
    rows = {
        "Format": f"{foreign.layout} ({path.name}): {foreign.kind}",
        "Parameters": _count_by_module(foreign.tensors),
    }
    if foreign.kind != "policy":
        return rows | {"To use it": f"wam convert {path} FOLDER"}

    # The weights alone determine neither cameras nor normalisation.
    if not contracts.release_is_known(foreign, path, checkpoint_request):
        dtypes = {str(x.dtype).removeprefix("torch.") for x in foreign.tensors.values()}
        rows["Stored in"] = ", ".join(sorted(dtypes))
        rows["Contract"] = (
            "unknown: the file does not record what it was trained for; "
            "wam convert --preset … adds it"
        )
        return rows

    config, origin = contracts.foreign_config(foreign, path, checkpoint_request)
    rows |= _describe_config(config, path.parent, {})
    for part, source in origin.items():
        rows[f"From: {part}"] = source
    return rows


def _describe_config(
    config: PolicyConfig, folder: Path, prompts: Mapping[str, Tensor]
) -> dict[str, str]:
    """Describe a configuration and what the policy needs to run.

    Args:
        config: Configuration of the policy.
        folder: Folder of the checkpoint.
        prompts: Known prompt embeddings.
    """
    known = f"{len(prompts)} prompts known" if prompts else "no prompt known"
    text_encoder = "none: only known prompts"
    if config.text is not None:
        text_encoder = _describe_source(config.text)
    return {
        **contract_rows(config),
        "Precision": config.precision,
        "Codec": _describe_source(config.vae),
        "Text encoder": f"{text_encoder}; {known}",
        "To run": _describe_memory(config, folder),
    }


def _describe_memory(config: PolicyConfig, folder: Path) -> str:
    """Describe the memory that the weights of a policy and of its video VAE take."""
    itemsize = getattr(torch, config.dtype).itemsize
    model = checkpoint.empty_model(config)
    model_bytes = _count(model.state_dict().values()) * itemsize
    text = f"{_format_bytes(model_bytes)} for the weights in {config.dtype}"

    # A VAE on the Hub is not downloaded to be measured.
    parameters = _count_vae(config.vae, folder)
    if parameters is None:
        return text
    encoder, decoder = parameters
    text += f"; {_format_bytes(encoder * itemsize)} for the codec's encoder"
    if config.form != "lean":
        text += f", {_format_bytes(decoder * itemsize)} more to imagine"
    return text


def _describe_source(source: Source) -> str:
    """Describe where a frozen encoder is stored."""
    text = source.repo or "this checkpoint"
    if source.subfolder:
        text += f", {source.subfolder}/"
    return text


def _count_vae(source: Source, folder: Path) -> tuple[int, int] | None:
    """Count the parameters of a video VAE's encoder and decoder.

    Args:
        source: Source of the VAE.
        folder: Folder of the checkpoint.

    Returns:
        The two counts; None if the VAE's configuration is not in the checkpoint.

    Raises:
        CheckpointError: The VAE's configuration is invalid.
    """
    path = folder / source.subfolder / checkpoint.CONFIG
    if source.repo is not None or not path.is_file():
        return None
    tensors = components.empty_vae(path.parent).model.state_dict()
    encoder = _count(x for name, x in tensors.items() if name.startswith(components.ENCODER))
    return encoder, _count(tensors.values()) - encoder


def _count_by_module(tensors: Mapping[str, Tensor]) -> str:
    """Return the number of parameters, in total and by the first component of their names."""
    counts: dict[str, int] = {}
    for name, tensor in tensors.items():
        module = name.partition(".")[0]
        counts[module] = counts.get(module, 0) + tensor.numel()
    by_module = ", ".join(f"{module} {count:,}" for module, count in counts.items())
    return f"{sum(counts.values()):,} ({by_module})"


def _count(tensors: Iterable[Tensor]) -> int:
    """Return the number of parameters of some tensors."""
    return sum(tensor.numel() for tensor in tensors)


def _format_bytes(size: int) -> str:
    """Return a size in GiB, or in MiB if it is below one GiB."""
    if size >= 2**30:
        return f"{size / 2**30:.2f} GiB"
    return f"{size / 2**20:.1f} MiB"
