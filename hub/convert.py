"""`wam convert`: a checkpoint of another project becomes one of ours, or a part that ours are made of."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor
from tyro.conf import Positional

from wam_policy.config import FORMAT_VERSION, DtypeName, Form, Source
from wam_policy.errors import CheckpointError, ConfigError
from wam_policy.hub import checkpoint, components, forms, request, weights
from wam_policy.hub import load as reader
from wam_policy.hub.download import DownloadOptions
from wam_policy.hub.foreign import contracts, wan
from wam_policy.hub.foreign.identify import ForeignCheckpoint
from wam_policy.hub.foreign.shapes import infer_config
from wam_policy.models.encoders.text import PromptEmbeddings
from wam_policy.models.encoders.vae import build_vae
from wam_policy.models.fast_wam.variants import VariantName
from wam_policy.presets import ReleaseInfo
from wam_policy.utils.io import replace_files

T = TypeVar("T")
logger = logging.getLogger(__name__)
SPARE = 1.02  # of the disk space the tensors take: headers, cards
TOKENIZER_BESIDE = "google/umt5-xxl"  # where Wan's repositories keep it
TOKENIZER_FILES = {".json", ".model", ".txt"}


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Conversion of a checkpoint of another project: a policy, a part to train from, a video codec or a text encoder."""

    src: Positional[str]
    """File (.pt, .pth, .safetensors), folder or Hub id."""
    dst: Positional[Path]
    """Folder to make."""
    filename: str | None = None
    """The file, in a folder or Hub repository of several."""
    preset: str | None = None
    """What a file of a reference implementation was trained for: "libero", "robotwin" or, a Light-WAM, "real_robot"; known of
    Fast-WAM's releases, and mostly said by a Light-WAM's config.yaml."""
    variant: VariantName | None = None
    """A Fast-WAM's variant; known of the releases."""
    action_shift: float | None = None
    """The shift a Fast-WAM's actions are sampled with; known of the releases."""
    head_dim: int = 128
    """Width of its attention heads."""
    proprio: bool = True
    """Whether it was trained to read the state."""
    stats: Path | None = None
    """Its dataset_stats.json; the default is the one beside it."""
    dtype: DtypeName | None = None
    """What weights are stored and computed in; the default is what they are."""
    codec: Path | None = None
    """Folder of a video codec (diffusers' layout) to put into the checkpoint; without it, it names the Hub's."""
    text_encoder: Path | None = None
    """Folder of a text encoder (`text_encoder/`, `tokenizer/`) to put into the checkpoint; without it, it names the Hub's."""
    tokenizer: Path | None = None
    """For a text encoder: the folder of its tokenizer; the default is `google/umt5-xxl` beside the file."""
    form: Form | None = None
    """What of a Light-WAM to write: all weights ("fat", the default for another project's), those that were trained ("slim"),
    or those that acting needs ("lean"). A checkpoint of this package is only converted to another form."""
    base: str | None = None
    """Of a slim checkpoint: folder or Hub id of its frozen weights, which are compared with those in the source."""
    base_revision: str | None = None
    """Branch, tag or commit of the base on the Hub."""
    sha256: str | None = None
    """Refuse a source file that isn't this one."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""

    def wanted(self) -> request.CheckpointRequest:
        """What is to be read, and what the caller says about it.

        Raises:
            ConfigError: only a part of what has to be said.
        """
        given = None
        if self.preset is not None:
            given = ReleaseInfo(
                preset=self.preset,
                variant=self.variant,
                action_shift=self.action_shift,
                head_dim=self.head_dim,
                proprio=self.proprio,
            )
        if (self.variant is None) != (self.action_shift is None) or (
            given is None and self.variant is not None
        ):
            raise ConfigError(
                "say all of --preset, --variant and --action-shift of a Fast-WAM, or none of them for a known release; "
                "of a Light-WAM --preset alone"
            )
        if given is None and not self.proprio:
            raise ConfigError(
                "--no-proprio says what a policy was trained with: say its --preset too"
            )
        return request.CheckpointRequest(self.src, self.filename, given, self.stats)


def convert(config: ConvertConfig) -> Path:
    """Convert, and return the new folder. The source is only read; the new folder is whole or isn't there.

    Raises:
        CheckpointError: the source can't be read or isn't the one wanted, the folder exists, the disk is too small.
        ConfigError: what was said doesn't fit the source.
    """
    wanted, download, dst = config.wanted(), DownloadOptions(revision=config.revision), config.dst
    path = wanted.locate(download)
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise CheckpointError(f"{dst} exists already; choose a new folder")
    ours = path.is_dir() and checkpoint.is_native(path)
    hashes = _hashes(path)
    if config.sha256 is not None and [*hashes.values()] != [config.sha256.lower()]:
        raise CheckpointError(
            f"{path} isn't the wanted file: {config.sha256} was wanted, found {hashes}; fetch it again"
        )
    if ours:
        return _reform(config, path, download, hashes)
    found = reader.read_foreign(path)
    dtype = None if config.dtype is None else getattr(torch, config.dtype)
    _check_space(dst, found.tensors, dtype)
    origin = {"weights": found.layout}
    with _no_space(dst):
        if found.kind == "policy":
            _policy(config, wanted, found, path, origin, hashes)
        elif found.kind == "part":
            _part(config, found, dtype, _map(origin, hashes))
        elif found.kind == "codec":
            _codec(dst, found, dtype, _map(origin, hashes))
        else:
            _text_encoder(
                dst,
                found,
                dtype,
                config.tokenizer or path.parent / TOKENIZER_BESIDE,
                _map(origin, hashes),
            )
    logger.info("%s: %s, %s -> %s", path, found.kind, found.layout, dst)
    return dst


def _reform(
    config: ConvertConfig, path: Path, download: DownloadOptions, hashes: Mapping[str, str]
) -> Path:
    """A checkpoint of ours in another form."""
    present = checkpoint.read_config(path)
    if config.form is None or present.form == config.form:
        raise CheckpointError(
            f"{path} is a wam-policy checkpoint already, a {present.form} one: load it with WAMPolicy.from_pretrained, "
            f"or say another --form"
        )
    options = (
        "filename",
        "preset",
        "variant",
        "action_shift",
        "stats",
        "codec",
        "text_encoder",
        "tokenizer",
    )
    if said := [name for name in options if getattr(config, name) is not None]:
        raise ConfigError(
            f"{path} says its whole contract: leave out --{', --'.join(said).replace('_', '-')}"
        )
    own = weights.read_weights(path)
    stored = (
        next(iter(own.values())).dtype if config.dtype is None else getattr(torch, config.dtype)
    )
    _check_space(config.dst, own, stored)
    parts = checkpoint.read_checkpoint(path, download, device=torch.device("cpu"), dtype=stored)
    if config.dtype is not None:
        parts = replace(parts, config=replace(present, dtype=config.dtype))
    with _no_space(config.dst):
        _write(
            config,
            parts,
            stored,
            _map({"weights": f"a {present.form} checkpoint, `{path.name}`"}, hashes),
        )
    return config.dst


def _write(
    config: ConvertConfig, parts: checkpoint.PolicyParts, dtype: torch.dtype | None, notes: str
) -> None:
    """Write a policy in the form that is wanted."""
    base = None if config.base is None else Source(repo=config.base, revision=config.base_revision)
    shaped = forms.to_form(parts, config.form, base, dtype, config.dst)
    checkpoint.write_checkpoint(
        config.dst, shaped, dtype=dtype, load_by=f"path/to/{config.dst.name}", notes=notes
    )


def _policy(
    config: ConvertConfig,
    wanted: request.CheckpointRequest,
    found: ForeignCheckpoint,
    path: Path,
    origin: Mapping[str, str],
    hashes: Mapping[str, str],
) -> None:
    """A whole checkpoint, whose frozen parts are the Hub's or copied into it."""
    contract, said = contracts.foreign_config(found, path, wanted)
    parts_from = {
        "codec": (contract.vae, config.codec),
        "text encoder": (contract.text, config.text_encoder),
    }
    for name, (source, folder) in parts_from.items():
        if folder is not None:
            said = {**said, name: f"`{folder.name}`, copied into this checkpoint"}
        elif source is not None:
            said = {name: f"`{source.repo}`", **said}
    contract = replace(
        contract,
        dtype=config.dtype or contract.dtype,
        vae=contract.vae if config.codec is None else Source(subfolder="vae"),
        text=contract.text if config.text_encoder is None else Source(subfolder="text"),
    )
    dtype, here = getattr(torch, contract.dtype), torch.device("cpu")
    model = checkpoint.empty_model(contract)
    weights.assign_weights(model, found.tensors, str(path), dtype=dtype, device=here)

    def load(loader: Callable[..., T], folder: Path | None) -> T:
        assert folder is not None  # `write` asks for what lives in the checkpoint only
        return loader(
            Source(subfolder=folder.resolve().name),
            folder.resolve().parent,
            DownloadOptions(),
            dtype=dtype,
            device=here,
        )

    prompts = PromptEmbeddings(
        {},
        token_length=contract.prompt.token_length,
        text_dim=contract.model.text_dim,
        encoder=lambda: load(components.load_text, config.text_encoder),
    )
    parts = checkpoint.PolicyParts(
        contract, model, lambda: load(components.load_vae, config.codec), prompts
    )
    _write(config, parts, None, _map({**origin, **said}, hashes))


def _part(
    config: ConvertConfig, found: ForeignCheckpoint, dtype: torch.dtype | None, notes: str
) -> None:
    """A folder to train from: the weights that there are, and the sizes they tell."""
    base = {
        "format_version": FORMAT_VERSION,
        "sizes": infer_config(found.tensors, found.head_dim or config.head_dim),
    }
    title = f"# {config.dst.name}\n\nParts of a policy, to train from: `wam train --pretrained-path {config.dst.name}`\n\n"
    with replace_files(config.dst, checkpoint.BASE) as stage:
        weights.write_weights(stage, found.tensors, dtype=dtype)
        (stage / "README.md").write_text(f"{title}{notes}\n")
        (stage / checkpoint.BASE).write_text(json.dumps(base, indent=2) + "\n")


def _codec(dst: Path, found: ForeignCheckpoint, dtype: torch.dtype | None, notes: str) -> None:
    """A video codec in diffusers' layout."""
    config, tensors = wan.codec(found.tensors)
    with torch.device("meta"):
        weights.check_fit(tensors, build_vae(config).model.state_dict(), "the codec")
    with replace_files(dst, checkpoint.CONFIG) as stage:
        weights.write_weights(stage, tensors, components.VAE_STEM, dtype=dtype)
        (stage / "README.md").write_text(
            f"# {dst.name}\n\nA video codec, `diffusers.AutoencoderKLWan`.\n\n{notes}\n"
        )
        (stage / checkpoint.CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _text_encoder(
    dst: Path, found: ForeignCheckpoint, dtype: torch.dtype | None, tokenizer: Path, notes: str
) -> None:
    """A text encoder in transformers' layout, its tokenizer beside it."""
    from transformers import UMT5Config, UMT5EncoderModel

    files = [file for file in tokenizer.glob("*") if file.suffix in TOKENIZER_FILES]
    if not files:
        raise CheckpointError(
            f"a text encoder needs its tokenizer, and there is none at {tokenizer}: say --tokenizer FOLDER"
        )
    fields, tensors = wan.text_encoder(found.tensors)
    config = UMT5Config(**fields, architectures=["UMT5EncoderModel"])
    with torch.device("meta"):
        expected = UMT5EncoderModel(config).state_dict()
    tied = {"encoder.embed_tokens.weight": tensors["shared.weight"]}
    weights.check_fit(tensors | tied, expected, "the text encoder")
    with replace_files(dst, f"{components.TEXT_ENCODER}/{checkpoint.CONFIG}") as stage:
        folders = [stage / components.TEXT_ENCODER, stage / components.TOKENIZER]
        for folder in folders:
            folder.mkdir()
        weights.write_weights(folders[0], tensors, dtype=dtype)
        config.save_pretrained(folders[0])
        for file in files:
            shutil.copy(file, folders[1])
        (stage / "README.md").write_text(
            f"# {dst.name}\n\nA text encoder, `transformers.UMT5EncoderModel`.\n\n{notes}\n"
        )


def _map(origin: Mapping[str, str], hashes: Mapping[str, str]) -> str:
    """What came from where, for the card."""
    rows = {**origin, **{f"`{name}`": f"sha256 `{digest}`" for name, digest in hashes.items()}}
    return "\n".join(
        [
            "## Where this came from",
            "",
            "| | |",
            "|---|---|",
            *(f"| {key} | {row} |" for key, row in rows.items()),
        ]
    )


def _hashes(path: Path) -> dict[str, str]:
    """SHA-256 of every weight file of the source."""
    hashes = {}
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with file.open("rb") as opened:
            hashes[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return hashes


def _check_space(dst: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """Refuse to begin what the disk can't hold."""
    needed = SPARE * sum(x.numel() * (dtype or x.dtype).itemsize for x in tensors.values())
    there = next(folder for folder in dst.resolve().parents if folder.is_dir())
    if (free := shutil.disk_usage(there).free) < needed:
        raise CheckpointError(
            f"{dst} needs {needed / 2**30:.1f} GiB, the disk has {free / 2**30:.1f} GiB left"
        )


@contextmanager
def _no_space(dst: Path) -> Iterator[None]:
    """Say what a failed write means; what was written is gone by then."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"can't write {dst}: {error}; nothing is left of it, the source is as it was"
        ) from error
