"""`wam convert`: conversion of other projects' checkpoints to this package's format.

A checkpoint of this package can be converted to another form (see `hub.checkpoint_forms`).
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from tyro.conf import Positional

from wam_policy.config import FORMAT_VERSION, DtypeName, Form, PolicyConfig, Source
from wam_policy.errors import CheckpointError, ConfigError
from wam_policy.hub import checkpoint, checkpoint_forms, checksums, components, request, weights
from wam_policy.hub.download import DownloadOptions
from wam_policy.hub.foreign import contracts, wan
from wam_policy.hub.foreign.identify import ForeignCheckpoint
from wam_policy.hub.foreign.shapes import infer_config
from wam_policy.hub.load import read_foreign
from wam_policy.models.encoders.text import PromptEmbeddings, TextEncoder
from wam_policy.models.encoders.vae import VAE, build_vae
from wam_policy.models.fast_wam.variants import VariantName
from wam_policy.presets import ReleaseInfo
from wam_policy.utils.io import replace_files

T = TypeVar("T", VAE, TextEncoder)
logger = logging.getLogger(__name__)

# Disk space of a checkpoint, relative to that of its tensors: file headers and the card.
SPACE_FACTOR = 1.02

# Folder of the tokenizer beside the text encoder's file in Wan's repositories.
TOKENIZER_BESIDE = "google/umt5-xxl"
TOKENIZER_FILES = {".json", ".model", ".txt"}

# Options that only describe checkpoints of other projects.
_FOREIGN_OPTIONS = (
    "preset",
    "variant",
    "action_shift",
    "stats",
    "codec",
    "text_encoder",
    "tokenizer",
)


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Conversion of a checkpoint of another project: policy, part, video VAE or text encoder."""

    src: Positional[str]
    """File (.pt, .pth, .safetensors), folder or Hub id."""
    dst: Positional[Path]
    """Folder to create."""
    filename: str | None = None
    """File to read, in a folder or Hub repository of several."""
    preset: str | None = None
    """What a file of a reference implementation was trained for: "libero", "robotwin", "real_robot"
    (Light-WAM only), or a JSON file with the fields of a `Preset` for your own robot. Not needed
    for the Fast-WAM releases, nor for a Light-WAM whose config.yaml records it."""
    variant: VariantName | None = None
    """Variant of a Fast-WAM; not needed for the releases."""
    action_shift: float | None = None
    """Shift of the schedule that a Fast-WAM's actions are sampled with; not needed for the
    releases."""
    head_dim: int = 128
    """Width of the model's attention heads."""
    proprio: bool = True
    """Whether the policy was trained with the proprioceptive state as an input."""
    stats: Path | None = None
    """The policy's dataset_stats.json; the default is the one beside the file."""
    state_groups: tuple[str, ...] = ()
    """Groups of numbers in that file, in the order in which they form the state; the default is the
    one group of the released files."""
    action_groups: tuple[str, ...] = ()
    """Likewise of the actions."""
    dtype: DtypeName | None = None
    """Dtype in which weights are stored and computed; the default is that of the source."""
    codec: Path | None = None
    """Folder of a video VAE (diffusers' layout) to copy into the checkpoint; without it, the
    checkpoint names one on the Hub."""
    text_encoder: Path | None = None
    """Folder of a text encoder (`text_encoder/`, `tokenizer/`) to copy into the checkpoint; without
    it, the checkpoint names one on the Hub."""
    tokenizer: Path | None = None
    """For a text encoder: folder of its tokenizer; the default is `google/umt5-xxl` beside the
    file."""
    form: Form | None = None
    """Form of a Light-WAM's checkpoint: all weights ("fat", the default for other projects'
    checkpoints), only the trained weights ("slim"), or only what inference needs ("lean").
    Required for a checkpoint of this package."""
    base: str | None = None
    """For a slim checkpoint: folder or Hub id of its frozen weights, which must equal those of the
    source."""
    base_revision: str | None = None
    """Branch, tag or commit of the base on the Hub."""
    sha256: str | None = None
    """Expected SHA-256 of the source file; another file is refused."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""

    def checkpoint_request(self) -> request.CheckpointRequest:
        """Return the request for the source checkpoint.

        Raises:
            ConfigError: Options that belong together are incomplete.
        """
        release = None
        if self.preset is not None:
            release = ReleaseInfo(
                preset=self.preset,
                variant=self.variant,
                action_shift=self.action_shift,
                head_dim=self.head_dim,
                proprio=self.proprio,
                state_groups=self.state_groups,
                action_groups=self.action_groups,
            )

        # A variant and a shift belong together, and are nothing without a preset.
        half_given = (self.variant is None) != (self.action_shift is None)
        if half_given or (release is None and self.variant is not None):
            raise ConfigError(
                "for a Fast-WAM, pass all of --preset, --variant and --action-shift, or none of "
                "them for a known release; for a Light-WAM, pass --preset alone"
            )
        describes = not self.proprio or self.state_groups or self.action_groups
        if release is None and describes:
            raise ConfigError(
                "--no-proprio, --state-groups and --action-groups describe how a policy was "
                "trained: pass its --preset too"
            )
        if self.base_revision is not None and self.base is None:
            raise ConfigError("--base-revision is the revision of --base: pass --base too")
        return request.CheckpointRequest(self.src, self.filename, release, self.stats)


def convert(config: ConvertConfig) -> Path:
    """Convert a checkpoint.

    The source is only read. The new folder is complete, or does not exist.

    Args:
        config: Source, destination and options.

    Returns:
        The new folder.

    Raises:
        CheckpointError: The source is unreadable or has another hash, the folder exists, or the
            disk is too small.
        ConfigError: The options contradict the source.
    """
    checkpoint_request = config.checkpoint_request()
    download = DownloadOptions(revision=config.revision)
    dst = config.dst
    path = checkpoint_request.locate(download)
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise CheckpointError(f"{dst} exists already; choose a new folder")

    # Hash before reading: an unexpected file is refused before its content is interpreted.
    is_native = path.is_dir() and checkpoint.is_native(path)
    hashes = _hash_files(path)
    if config.sha256 is not None and list(hashes.values()) != [config.sha256.lower()]:
        raise CheckpointError(
            f"{path} is not the expected file: expected sha256 {config.sha256}, got {hashes}; "
            f"download it again"
        )
    if is_native:
        return _convert_native(config, path, download, hashes)

    # Tensors are memory-mapped: the disk is checked before any of them is read.
    foreign = read_foreign(path)
    dtype = None if config.dtype is None else getattr(torch, config.dtype)
    _check_space(dst, foreign.tensors, dtype)
    if foreign.kind == "policy":
        _write_policy(config, checkpoint_request, foreign, path, hashes)
    else:
        _write_component(config, foreign, path, dtype, hashes)
    logger.info("%s: %s, %s -> %s", path, foreign.kind, foreign.layout, dst)
    return dst


def _convert_native(
    config: ConvertConfig, path: Path, download: DownloadOptions, hashes: Mapping[str, str]
) -> Path:
    """Convert a checkpoint of this package to another form, and return the new folder.

    Raises:
        CheckpointError: The checkpoint has that form already, or is unreadable.
        ConfigError: Options describe a checkpoint of another project.
    """
    source_config = checkpoint.read_config(path)
    if config.form is None or source_config.form == config.form:
        raise CheckpointError(
            f"{path} is a wam-policy checkpoint already, a {source_config.form} one: "
            f"load it with WAMPolicy.from_pretrained, or pass another --form"
        )
    surplus = [name for name in _FOREIGN_OPTIONS if getattr(config, name) is not None]
    if surplus:
        options = ", ".join(f"--{name}" for name in surplus).replace("_", "-")
        raise ConfigError(f"{path} holds its own configuration: leave out {options}")

    # Weights keep the dtype in which they are stored, whatever the policy computes in.
    tensors = weights.read_weights(path)
    dtype = next(iter(tensors.values())).dtype
    if config.dtype is not None:
        dtype = getattr(torch, config.dtype)
    _check_space(config.dst, tensors, dtype)

    load_options = checkpoint.LoadOptions(download=download, dtype=dtype)
    parts = checkpoint.read_checkpoint(path, load_options)
    if config.dtype is not None:
        parts = replace(parts, config=replace(source_config, dtype=config.dtype))
    origin = {"weights": f"a {source_config.form} checkpoint, `{path.name}`"}
    _write_checkpoint(config, parts, dtype, _describe_origin(origin, hashes))
    return config.dst


def _write_checkpoint(
    config: ConvertConfig, parts: checkpoint.PolicyParts, dtype: torch.dtype | None, notes: str
) -> None:
    """Write a policy in the form that the options ask for.

    Args:
        config: Options of the conversion.
        parts: Parts of the policy.
        dtype: Dtype in which tensors are stored; None keeps their own.
        notes: Markdown for the end of the card.
    """
    base = None
    if config.base is not None:
        base = Source(repo=config.base, revision=config.base_revision)
    parts = checkpoint_forms.to_form(parts, config.form, base, dtype, config.dst)
    load_by = f"path/to/{config.dst.name}"
    checkpoint.write_checkpoint(config.dst, parts, dtype=dtype, load_by=load_by, notes=notes)


def _write_policy(
    config: ConvertConfig,
    checkpoint_request: request.CheckpointRequest,
    foreign: ForeignCheckpoint,
    path: Path,
    hashes: Mapping[str, str],
) -> None:
    """Write a policy, whose frozen encoders are named by their Hub id or copied.

    Args:
        config: Options of the conversion.
        checkpoint_request: Request for the source.
        foreign: Content of the source; its tensors are consumed.
        path: File or folder of the source.
        hashes: SHA-256 of the source's files by name.
    """
    policy_config, config_origin = contracts.foreign_config(foreign, path, checkpoint_request)
    origin = {"weights": foreign.layout}
    origin |= _with_encoders(config, policy_config, config_origin)

    # A copied encoder lives in a folder of the checkpoint, not in a repository.
    dtype_name = config.dtype or policy_config.dtype
    policy_config = replace(policy_config, dtype=dtype_name)
    if config.codec is not None:
        policy_config = replace(policy_config, vae=Source(subfolder="vae"))
    if config.text_encoder is not None:
        policy_config = replace(policy_config, text=Source(subfolder="text"))

    # The weights are loaded now, the copied encoders when they are written.
    dtype = getattr(torch, dtype_name)
    device = torch.device("cpu")
    model = checkpoint.empty_model(policy_config)
    weights.assign_weights(model, foreign.tensors, str(path), dtype=dtype, device=device)

    def load(loader: Callable[..., T], folder: Path | None) -> T:
        """Load an encoder from the folder that the options name."""
        # `write_checkpoint` loads only the encoders that are copied into the checkpoint.
        assert folder is not None
        folder = folder.resolve()
        source = Source(subfolder=folder.name)
        return loader(source, folder.parent, DownloadOptions(), dtype=dtype, device=device)

    prompts = PromptEmbeddings(
        {},
        token_length=policy_config.prompt.token_length,
        text_dim=policy_config.model.text_dim,
        load_encoder=lambda: load(components.load_text, config.text_encoder),
    )
    parts = checkpoint.PolicyParts(
        policy_config, model, lambda: load(components.load_vae, config.codec), prompts
    )
    _write_checkpoint(config, parts, None, _describe_origin(origin, hashes))


def _with_encoders(
    config: ConvertConfig, policy_config: PolicyConfig, origin: Mapping[str, str]
) -> Mapping[str, str]:
    """Return the origin of a configuration's parts, with that of the frozen encoders added."""
    encoders = {
        "codec": (policy_config.vae, config.codec),
        "text encoder": (policy_config.text, config.text_encoder),
    }
    for name, (source, folder) in encoders.items():
        if folder is not None:
            origin = {**origin, name: f"`{folder.name}`, copied into this checkpoint"}
        elif source is not None:
            # An entry of the configuration itself says more than the Hub id.
            origin = {name: f"`{source.repo}`", **origin}
    return origin


def _write_component(
    config: ConvertConfig,
    foreign: ForeignCheckpoint,
    path: Path,
    dtype: torch.dtype | None,
    hashes: Mapping[str, str],
) -> None:
    """Write a part of a policy, a video VAE or a text encoder.

    Args:
        config: Options of the conversion.
        foreign: Content of the source.
        path: File or folder of the source.
        dtype: Dtype in which tensors are stored; None keeps their own.
        hashes: SHA-256 of the source's files by name.
    """
    notes = _describe_origin({"weights": foreign.layout}, hashes)
    if foreign.kind == "part":
        _write_part(config, foreign, dtype, notes)
    elif foreign.kind == "video VAE":
        _write_vae(config.dst, foreign, dtype, notes)
    else:
        tokenizer = config.tokenizer or path.parent / TOKENIZER_BESIDE
        _write_text_encoder(config.dst, foreign, dtype, tokenizer, notes)


def _write_part(
    config: ConvertConfig, foreign: ForeignCheckpoint, dtype: torch.dtype | None, notes: str
) -> None:
    """Write a folder to train from, with the present weights and the sizes inferred from them."""
    head_dim = foreign.head_dim or config.head_dim
    parts_config = {
        "format_version": FORMAT_VERSION,
        "sizes": infer_config(foreign.tensors, head_dim),
    }
    name = config.dst.name
    card = (
        f"# {name}\n\n"
        f"Parts of a policy, to train from: `wam train --pretrained-path {name}`\n\n"
        f"{notes}\n"
    )
    with replace_files(config.dst, checkpoint.PARTS_CONFIG) as stage:
        weights.write_weights(stage, foreign.tensors, dtype=dtype)
        (stage / "README.md").write_text(card, encoding="utf-8")
        (stage / checkpoint.PARTS_CONFIG).write_text(json.dumps(parts_config, indent=2) + "\n")


def _write_vae(
    dst: Path, foreign: ForeignCheckpoint, dtype: torch.dtype | None, notes: str
) -> None:
    """Write a video VAE in diffusers' layout."""
    config, tensors = wan.video_vae(foreign.tensors)
    with torch.device("meta"):
        expected = build_vae(config).model.state_dict()
        weights.check_fit(tensors, expected, "the video VAE")

    card = f"# {dst.name}\n\nA video codec, `diffusers.AutoencoderKLWan`.\n\n{notes}\n"
    with replace_files(dst, checkpoint.CONFIG) as stage:
        weights.write_weights(stage, tensors, components.VAE_STEM, dtype=dtype)
        (stage / "README.md").write_text(card, encoding="utf-8")
        (stage / checkpoint.CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _write_text_encoder(
    dst: Path, foreign: ForeignCheckpoint, dtype: torch.dtype | None, tokenizer: Path, notes: str
) -> None:
    """Write a text encoder and its tokenizer in transformers' layout.

    Args:
        dst: Folder to write.
        foreign: Content of the source.
        dtype: Dtype in which tensors are stored; None keeps their own.
        tokenizer: Folder of the tokenizer's files, which are copied.
        notes: Markdown for the end of the card.

    Raises:
        CheckpointError: The tokenizer is missing, or the weights are incomplete.
    """
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer_files = [file for file in tokenizer.glob("*") if file.suffix in TOKENIZER_FILES]
    if not tokenizer_files:
        raise CheckpointError(
            f"a text encoder needs its tokenizer, but {tokenizer} holds none: "
            f"pass --tokenizer FOLDER"
        )

    # The embedding has two names in the model; the file holds it once.
    fields, tensors = wan.text_encoder(foreign.tensors)
    config = UMT5Config(**fields, architectures=["UMT5EncoderModel"])
    with torch.device("meta"):
        expected = UMT5EncoderModel(config).state_dict()
    tied = {"encoder.embed_tokens.weight": tensors["shared.weight"]}
    weights.check_fit(tensors | tied, expected, "the text encoder")

    card = f"# {dst.name}\n\nA text encoder, `transformers.UMT5EncoderModel`.\n\n{notes}\n"
    with replace_files(dst, f"{components.TEXT_ENCODER}/{checkpoint.CONFIG}") as stage:
        encoder_folder = stage / components.TEXT_ENCODER
        tokenizer_folder = stage / components.TOKENIZER
        encoder_folder.mkdir()
        tokenizer_folder.mkdir()
        weights.write_weights(encoder_folder, tensors, dtype=dtype)
        config.save_pretrained(encoder_folder)
        for file in tokenizer_files:
            shutil.copy(file, tokenizer_folder)
        (stage / "README.md").write_text(card, encoding="utf-8")


def _describe_origin(origin: Mapping[str, str], hashes: Mapping[str, str]) -> str:
    """Return the card's table of where each part of a checkpoint came from.

    Args:
        origin: Descriptions by part.
        hashes: SHA-256 of the source's files by name.
    """
    rows = dict(origin)
    for name, sha256 in hashes.items():
        rows[f"`{name}`"] = f"sha256 `{sha256}`"
    lines = ["## Where this came from", "", "| | |", "|---|---|"]
    lines += [f"| {part} | {description} |" for part, description in rows.items()]
    return "\n".join(lines)


def _hash_files(path: Path) -> dict[str, str]:
    """Return the SHA-256 of a file, or of each safetensors file in a folder, by file name."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return {file.name: checksums.file_sha256(file) for file in files}


def _check_space(dst: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """Check, before anything is written, that the disk has room for a checkpoint.

    Args:
        dst: Folder of the new checkpoint.
        tensors: Tensors of the source.
        dtype: Dtype in which they will be stored; None keeps their own.

    Raises:
        CheckpointError: The disk is too small.
    """
    needed = SPACE_FACTOR * sum(x.numel() * (dtype or x.dtype).itemsize for x in tensors.values())
    existing = next(folder for folder in dst.resolve().parents if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise CheckpointError(
            f"{dst} needs {needed / 2**30:.1f} GiB, the disk has {free / 2**30:.1f} GiB left; "
            f"free some space, or choose another disk"
        )
