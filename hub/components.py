"""Loading of the frozen encoders of a policy: its video VAE and its text encoder.

See docs/method.md, "Encoders".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from wam_policy.config import Source
from wam_policy.errors import CheckpointError, ConfigError, WAMPolicyError
from wam_policy.hub import adapters, weights
from wam_policy.hub.download import PATTERNS, DownloadOptions, is_hub_snapshot, resolve_folder
from wam_policy.models.config import MAX_LAYERS, MAX_SIZE
from wam_policy.models.encoders.text import TextEncoder
from wam_policy.models.encoders.vae import VAE, build_vae
from wam_policy.utils import documents
from wam_policy.utils.json_dataclass import from_plain

if TYPE_CHECKING:
    from transformers import UMT5Config

# File stem of a VAE's weights in diffusers' layout.
VAE_STEM = "diffusion_pytorch_model"

# Prefixes of the names of a VAE's tensors.
ENCODER = ("encoder.", "quant_conv.")
DECODER = ("decoder.", "post_quant_conv.")

# Folder names in the layout of a diffusers pipeline.
TEXT_ENCODER = "text_encoder"
TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class VAEConfig:
    """The entries of a video VAE's `config.json`, to check their types; see diffusers'
    `AutoencoderKLWan`.
    """

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: list[int] = field(default_factory=lambda: [1, 2, 4, 4])
    num_res_blocks: int = 2
    attn_scales: list[float] = field(default_factory=list)
    temperal_downsample: list[bool] = field(default_factory=lambda: [False, True, True])
    dropout: float = 0.0
    latents_mean: list[float] | None = None
    latents_std: list[float] | None = None
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int | None = None
    scale_factor_spatial: int | None = None


# Names of the embedding of tokens in a text encoder.
SHARED = "shared.weight"
TIED = "encoder.embed_tokens.weight"

# Largest number of stages of a video VAE, and of blocks in each.
_MAX_VAE_DEPTH = 16

_CURE = "download it again"


@dataclass(frozen=True)
class TextConfig:
    """The entries of a text encoder's `config.json` that are followed.

    Others could name code, another implementation of attention, or a quantisation.
    """

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"

    def __post_init__(self) -> None:
        sizes = {name: size for name, size in asdict(self).items() if isinstance(size, int)}
        invalid = {name: size for name, size in sizes.items() if not 1 <= size <= MAX_SIZE}
        if self.num_layers > MAX_LAYERS:
            invalid["num_layers"] = self.num_layers
        if invalid or not 0 < self.layer_norm_epsilon < 1:
            raise ConfigError(f"no text encoder has the sizes {invalid or self}")


def component_folder(
    source: Source, checkpoint: Path, download: DownloadOptions, parts: tuple[str, ...] = ("",)
) -> Path:
    """Return the local folder of a frozen component, after a download if it is on the Hub.

    Args:
        source: Source of the component.
        checkpoint: Folder of the checkpoint, which holds components without a repository.
        download: Options of the download; the revision is the source's.
        parts: Folders inside the component's folder that are needed.

    Returns:
        Path of the folder.

    Raises:
        CheckpointError: The repository cannot be downloaded.
    """
    if source.repo is None:
        return checkpoint / source.subfolder

    patterns = []
    for part in parts:
        place = str(PurePosixPath(source.subfolder, part))
        prefix = "" if place == "." else f"{place}/"
        patterns += [f"{prefix}{pattern}" for pattern in PATTERNS]
    download = replace(download, revision=source.revision)
    may_be_local = not is_hub_snapshot(checkpoint)
    folder = resolve_folder(source.repo, download, patterns, may_be_local=may_be_local)
    return folder / source.subfolder


def empty_vae(folder: Path) -> VAE:
    """Build the video VAE that a folder in diffusers' layout describes, on the `meta` device.

    Raises:
        CheckpointError: Its configuration is missing or invalid.
    """
    config = documents.read_json_object(
        folder / "config.json", CheckpointError, f"there is no video VAE in {folder}"
    )
    try:
        _check_vae_config(config)
        with torch.device("meta"):
            return build_vae(config)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, OSError) as error:
        raise CheckpointError(f"no video VAE in {folder}: {error!s:.300}") from error


def _check_vae_config(config: dict[str, Any]) -> None:
    """Check the numbers of a video VAE's configuration before anything is built from them.

    Raises:
        ConfigError: A number is impossible.
    """
    names = {field.name for field in fields(VAEConfig)}
    checked = from_plain(VAEConfig, {name: x for name, x in config.items() if name in names})
    for name in names:
        value = getattr(checked, name)
        numbers = value if isinstance(value, list) else [value]
        sizes = [number for number in numbers if type(number) is int]
        if any(not 0 < size <= MAX_SIZE for size in sizes):
            raise ConfigError(f"no video VAE has {name} {value!r:.200}")

    # No stage has more blocks, and no VAE has more stages.
    if len(checked.dim_mult) > _MAX_VAE_DEPTH or checked.num_res_blocks > _MAX_VAE_DEPTH:
        raise ConfigError(
            f"no video VAE has {len(checked.dim_mult)} stages of {checked.num_res_blocks} blocks"
        )

    # What can be computed from other entries.
    if len(checked.temperal_downsample) != len(checked.dim_mult) - 1:
        raise ConfigError("`temperal_downsample` must be one shorter than `dim_mult`")
    patch = checked.patch_size or 1
    downsampled = checked.temperal_downsample
    expected = {
        "in_channels": 3 * patch**2,
        "out_channels": 3 * patch**2,
        "scale_factor_spatial": patch * 2 ** len(downsampled),
        "scale_factor_temporal": 2 ** sum(downsampled),
    }
    for name, number in expected.items():
        if getattr(checked, name) not in (None, number):
            raise ConfigError(f"`{name}` must be {number}, got {getattr(checked, name)}")

    # Latents are standardised by these.
    for name in ("latents_mean", "latents_std"):
        values = getattr(checked, name)
        if values is None:
            continue
        is_possible = name == "latents_mean" or min(values, default=1.0) > 0
        if len(values) != checked.z_dim or not is_possible:
            raise ConfigError(
                f"`{name}` must be {checked.z_dim} possible numbers, got {values!r:.200}"
            )


def load_vae(
    source: Source,
    checkpoint: Path,
    download: DownloadOptions,
    *,
    dtype: torch.dtype,
    device: torch.device,
    encoder_only: bool = False,
    mmap: bool = True,
    check_unchanged: Callable[[], None] | None = None,
) -> VAE:
    """Load the video VAE from a folder in diffusers' layout; its decoder is read at first use.

    Args:
        source: Source of the VAE.
        checkpoint: Folder of the checkpoint.
        download: Options for the download of a VAE that is stored elsewhere.
        dtype: Dtype of the VAE. CPUs without instructions for 16-bit floats use float32 instead:
            convolutions in 16 bits take minutes per image there.
        device: Device of the VAE.
        encoder_only: Accept a VAE without a decoder, as lean checkpoints hold it.
        mmap: Leave weights that need no cast in the mapped files; False copies them into memory.
        check_unchanged: Called after the checkpoint's own files were read; it raises an error if
            they may be of another version than the policy.

    Returns:
        The VAE.

    Raises:
        CheckpointError: The VAE is missing, unreadable, not finite, or does not match its
            configuration.
    """
    if device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        dtype = torch.float32

    folder = component_folder(source, checkpoint, download)
    model = empty_vae(folder).model.eval().requires_grad_(False)

    # A lean checkpoint's own VAE has no decoder; one of another repository may be complete.
    has_decoder = not encoder_only or _has_decoder(folder)
    if source.repo is not None:
        check_unchanged = None
    load = partial(
        _load_vae_part,
        model,
        folder,
        has_decoder=has_decoder,
        dtype=dtype,
        device=device,
        mmap=mmap,
        check_unchanged=check_unchanged,
    )
    load(ENCODER)
    vae = VAE(model, partial(load, DECODER))

    # The latent statistics come from the configuration, not from the weights: move them too.
    vae.mean = vae.mean.to(device)
    vae.std = vae.std.to(device)
    return vae


def _load_vae_part(
    model: nn.Module,
    folder: Path,
    prefixes: tuple[str, ...],
    *,
    has_decoder: bool,
    dtype: torch.dtype,
    device: torch.device,
    mmap: bool,
    check_unchanged: Callable[[], None] | None,
) -> None:
    """Load the tensors of a video VAE with these prefixes into the model.

    Arguments are those of `load_vae`.
    """
    if prefixes == DECODER and not has_decoder:
        raise CheckpointError(
            f"the video VAE in {folder} has no decoder: a lean checkpoint only acts; "
            f"load the fat or the slim checkpoint to decode video"
        )
    weights.load_weights(
        model,
        folder,
        VAE_STEM,
        dtype=dtype,
        device=device,
        prefixes=prefixes,
        expected_prefixes=("",) if has_decoder else ENCODER,
        mmap=mmap,
    )
    loaded = [(name, x) for name, x in model.named_parameters() if name.startswith(prefixes)]
    weights.check_finite(loaded, str(folder / VAE_STEM))
    if check_unchanged is not None:
        check_unchanged()


def _has_decoder(folder: Path) -> bool:
    """Return whether the weights of a VAE hold a decoder; no tensor data is read."""
    names = weights.read_shapes(folder, VAE_STEM)
    return any(name.startswith(DECODER) for name in names)


def load_text(
    source: Source,
    checkpoint: Path,
    download: DownloadOptions,
    *,
    dtype: torch.dtype,
    device: torch.device,
    clean: bool = True,
    check_unchanged: Callable[[], None] | None = None,
) -> TextEncoder:
    """Load the text encoder and its tokenizer from a folder in transformers' layout.

    No code beside the weights is executed, and nothing that their configurations name is followed.

    Args:
        source: Source of the folder, which holds `text_encoder/` and `tokenizer/`.
        checkpoint: Folder of the checkpoint.
        download: Options for the download of an encoder that is stored elsewhere.
        dtype: Dtype of the encoder.
        device: Device of the encoder.
        clean: Whether prompts are cleaned before they are embedded.
        check_unchanged: As in `load_vae`.

    Returns:
        The text encoder.

    Raises:
        CheckpointError: The encoder or its tokenizer is missing or unreadable, or the weights do
            not match the configuration.
    """
    from transformers import AutoTokenizer, UMT5EncoderModel

    folder = component_folder(source, checkpoint, download, (TEXT_ENCODER, TOKENIZER))
    config = _text_config(folder / TEXT_ENCODER)
    try:
        # An instance of its own: `from_pretrained` writes into the configuration.
        model = UMT5EncoderModel.from_pretrained(
            folder / TEXT_ENCODER,
            config=config,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
        tokenizer = AutoTokenizer.from_pretrained(
            folder / TOKENIZER, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        # The tokenizers library raises bare exceptions.
        raise CheckpointError(f"no text encoder in {folder}: {error!s:.500}") from error

    weights.check_finite(model.named_parameters(), str(folder / TEXT_ENCODER))
    if source.repo is None and check_unchanged is not None:
        check_unchanged()
    return TextEncoder(model.to(device), tokenizer, clean=clean)


def _text_config(folder: Path) -> UMT5Config:
    """Return the configuration of a text encoder, after a check that its weights have its sizes.

    Raises:
        CheckpointError: The folder holds an adapter, or the two do not match.
    """
    from transformers import UMT5Config, UMT5EncoderModel

    if (folder / adapters.CONFIG).exists():
        raise CheckpointError(f"{folder} holds an adapter, which is not loaded: merge it first")
    data = documents.read_json_object(
        folder / "config.json", CheckpointError, f"there is no text encoder in {folder}"
    )
    try:
        config = UMT5Config(**asdict(from_plain(TextConfig, data, foreign=True)))
        with torch.device("meta"):
            expected = UMT5EncoderModel(config).state_dict()
            stored = {
                name: torch.empty(shape) for name, shape in weights.read_shapes(folder).items()
            }
    except WAMPolicyError as error:
        raise CheckpointError(f"no text encoder in {folder}: {error}") from error
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"no text encoder in {folder}: {error!s:.300}") from error

    # The embedding has two names in the model; a file holds it once, or under both.
    if SHARED in stored:
        stored.setdefault(TIED, stored[SHARED])
    elif TIED in stored:
        stored[SHARED] = stored[TIED]
    weights.check_fit(stored, expected, f"the text encoder in {folder}")
    return config
