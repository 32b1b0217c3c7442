"""Model configurations: the quantities that a model is built from."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict, get_args

from wam_policy.errors import ConfigError

# Largest sizes of a model. No weights of larger ones exist: a larger number is a mistake, which is
# refused before anything is built.
MAX_LAYERS = 512
MAX_SIZE = 2**20


class SharedSizes(TypedDict):
    """Sizes that all experts of a model have in common; their widths may differ."""

    layers: int
    heads: int
    head_dim: int
    text_dim: int
    freq_dim: int
    eps: float


@dataclass(frozen=True, kw_only=True, slots=True)
class FastWAMConfig:
    """Sizes of the two Fast-WAM experts; the defaults are those of the released 6 B model."""

    # Size of an action vector.
    action_dim: int
    # Size of the proprioception vector; None: the model has no proprioception token.
    proprio_dim: int | None
    latent_channels: int = 48
    patch_size: tuple[int, int, int] = (1, 2, 2)
    video_dim: int = 3072
    video_ffn_dim: int = 14336
    action_expert_dim: int = 1024
    action_expert_ffn_dim: int = 4096
    layers: int = 30
    heads: int = 24
    head_dim: int = 128
    text_dim: int = 4096
    freq_dim: int = 256
    eps: float = 1e-6

    def __post_init__(self) -> None:
        check_sizes(self)


def check_sizes(config: FastWAMConfig | LightWAMConfig, may_be_zero: tuple[str, ...] = ()) -> None:
    """Check that a model of these sizes can be built.

    Args:
        config: Sizes to check.
        may_be_zero: Fields for which 0 is a valid value.

    Raises:
        ConfigError: A size is not positive or too large, a width that is split in two halves is
            odd, or a patch spans more than one latent frame.
    """
    sizes = {field.name: getattr(config, field.name) for field in fields(config)}
    _check_positive(sizes, may_be_zero)
    _check_not_too_large(sizes)

    # Rotary and sinusoidal embeddings pair up channels.
    paired = ("head_dim", "freq_dim", "step_dim")
    odd = {name: sizes[name] for name in paired if sizes.get(name, 0) % 2}
    if odd:
        names = " and ".join(f"`{name}`" for name in odd)
        raise ConfigError(f"{names} must be even, got {odd}")

    if config.patch_size[0] != 1:
        raise ConfigError(
            f"`patch_size`: expected patches that span one latent frame, got {config.patch_size}"
        )


def _check_positive(sizes: dict[str, Any], may_be_zero: tuple[str, ...]) -> None:
    """Check that every number among the sizes of a model is positive."""
    invalid = {}
    for name, size in sizes.items():
        smallest = 0 if name in may_be_zero else 1
        if isinstance(size, int) and size < smallest:
            invalid[name] = size
    if min(sizes["patch_size"]) < 1:
        invalid["patch_size"] = sizes["patch_size"]
    if not sizes["eps"] > 0:
        invalid["eps"] = sizes["eps"]

    if invalid:
        raise ConfigError(f"model sizes must be positive, got {invalid}")


def _check_not_too_large(sizes: dict[str, Any]) -> None:
    """Check that no number among the sizes of a model is larger than any model's."""
    invalid = {}
    for name, value in sizes.items():
        largest = MAX_LAYERS if name in ("layers", "trunk_blocks") else MAX_SIZE
        numbers = value if isinstance(value, tuple) else (value,)
        if len(numbers) > MAX_LAYERS:
            invalid[name] = f"{len(numbers)} values"
        elif any(isinstance(number, int) and number > largest for number in numbers):
            invalid[name] = value
    if invalid:
        raise ConfigError(
            f"model sizes must be at most {MAX_SIZE:,}, and layers {MAX_LAYERS}, got {invalid}"
        )


# Fields that a video expert is built from.
VIDEO_EXPERT_SIZES = (
    "latent_channels",
    "patch_size",
    "video_dim",
    "video_ffn_dim",
    "layers",
    "heads",
    "head_dim",
    "text_dim",
    "freq_dim",
    "eps",
)

Feature = Literal["backbone", "adapted", "delta"]
Pooling = Literal["learned_query", "mean"]
LORA_TARGETS = (
    "self_attn.q",
    "self_attn.k",
    "self_attn.v",
    "self_attn.o",
    "cross_attn.q",
    "cross_attn.k",
    "cross_attn.v",
    "cross_attn.o",
    "ffn.0",
    "ffn.2",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LightWAMConfig:
    """Sizes of a Light-WAM; the defaults are those of the released 2 B model."""

    # Size of an action vector.
    action_dim: int
    # Size of the proprioception vector; None: the model has no proprioception token.
    proprio_dim: int | None
    latent_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    video_dim: int = 1536
    video_ffn_dim: int = 8960
    layers: int = 30
    heads: int = 12
    head_dim: int = 128
    text_dim: int = 4096
    freq_dim: int = 256
    eps: float = 1e-6
    # Blocks (counted from 0) that are followed by an adapter, where features are recorded.
    taps: tuple[int, ...] = (8, 16, 24)
    adapter_dim: int = 256
    adapter_scale: float = 1.0
    # 0: the model has no LoRA, or it has been merged into the weights.
    lora_rank: int = 64
    lora_alpha: float = 128.0
    # Blocks with LoRA; None: all.
    lora_layers: tuple[int, ...] | None = None
    lora_targets: tuple[str, ...] = LORA_TARGETS
    # Features that the action head reads at each tap.
    features: tuple[tuple[Feature, ...], ...] = (("adapted",), ("adapted",), ("adapted",))
    pooling: Pooling = "learned_query"
    queries: int = 16
    pool_heads: int = 8
    # Width after merging the queries' outputs in slots; None: a weighted mean merges them.
    merge_dim: int | None = None
    merge_slots: int = 2
    layer_dim: int = 4608
    trunk_dim: int = 6144
    trunk_blocks: int = 1
    step_dim: int = 256
    # Side of the square of latent pixels that is averaged for the supervision of the video.
    video_pool: int = 2
    # Longest chunk of a lean model, which can only act; None: the model as it was trained.
    lean_steps: int | None = None

    def __post_init__(self) -> None:
        check_sizes(self, may_be_zero=("lora_rank", "trunk_blocks"))
        self._check_taps()
        self._check_action_head()
        self._check_lora()
        self._check_lean()

    def _check_taps(self) -> None:
        outside = [tap for tap in self.taps if not 0 <= tap < self.layers]
        ascending = list(self.taps) == sorted(set(self.taps))
        if outside or not ascending or not self.taps:
            raise ConfigError(
                f"`taps`: expected blocks 0 … {self.layers - 1} in ascending order, "
                f"got {list(self.taps)}"
            )

        if len(self.features) != len(self.taps) or not all(self.features):
            raise ConfigError(
                f"`features`: expected at least one feature for each of the {len(self.taps)} taps, "
                f"got {self.features}"
            )

    def _check_action_head(self) -> None:
        used = {feature for features in self.features for feature in features}
        unknown = sorted(used - set(get_args(Feature)))
        if unknown:
            raise ConfigError(f"unknown features {unknown}; known are {get_args(Feature)}")
        if self.pooling not in get_args(Pooling):
            raise ConfigError(f"unknown pooling {self.pooling!r}; known are {get_args(Pooling)}")

        if self.pooling == "learned_query" and self.video_dim % self.pool_heads:
            raise ConfigError(
                f"`video_dim` {self.video_dim} must be a multiple of `pool_heads` {self.pool_heads}"
            )

    def _check_lora(self) -> None:
        unknown = sorted(set(self.lora_targets) - set(LORA_TARGETS))
        if unknown:
            raise ConfigError(f"unknown LoRA targets {unknown}; choose from {LORA_TARGETS}")

        if self.lora_layers is not None and not set(self.lora_layers) <= set(range(self.layers)):
            raise ConfigError(
                f"`lora_layers`: expected blocks 0 … {self.layers - 1}, "
                f"got {list(self.lora_layers)}"
            )

    def _check_lean(self) -> None:
        if self.lean_steps is None:
            return
        if self.lora_rank or self.taps[-1] + 1 != self.layers:
            raise ConfigError(
                f"a lean model has no LoRA and ends at its last tap; got `lora_rank` "
                f"{self.lora_rank}, {self.layers} layers and taps {list(self.taps)}"
            )

    def lora_paths(self) -> list[str]:
        """Return the paths, inside the video expert, of the layers that LoRA adapts."""
        layers = range(self.layers) if self.lora_layers is None else self.lora_layers
        return [f"blocks.{layer}.{target}" for layer in layers for target in self.lora_targets]


def shared_sizes(config: FastWAMConfig | LightWAMConfig) -> SharedSizes:
    """Return the sizes that the experts of a model share so that they can attend to each other."""
    return SharedSizes(
        layers=config.layers,
        heads=config.heads,
        head_dim=config.head_dim,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        eps=config.eps,
    )
