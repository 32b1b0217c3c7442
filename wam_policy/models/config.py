"""Sizes of the models: everything their parameters' shapes depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypedDict, get_args

from wam_policy.errors import ConfigError


class SharedSizes(TypedDict):
    """Sizes of a transformer but its widths."""

    layers: int
    heads: int
    head_dim: int
    text_dim: int
    freq_dim: int
    eps: float


@dataclass(frozen=True, kw_only=True, slots=True)
class FastWAMConfig:
    """Sizes of the two experts; the defaults are the released 6 B model's."""

    action_dim: int  # numbers per action
    proprio_dim: int | None  # numbers of proprioception; None: no proprio token
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
        sizes = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("patch_size", "eps")}
        wrong = {name: size for name, size in sizes.items() if size is not None and size < 1}
        if wrong or min(self.patch_size) < 1 or not self.eps > 0:
            raise ConfigError(f"model sizes must be positive, got {wrong or {'patch_size': self.patch_size, 'eps': self.eps}}")
        if self.head_dim % 2 or self.freq_dim % 2:
            raise ConfigError(f"`head_dim` and `freq_dim` must be even, got {self.head_dim} and {self.freq_dim}")
        if self.patch_size[0] != 1:
            raise ConfigError(f"patches must be one latent frame long, got `patch_size` {self.patch_size}")


Feature = Literal["backbone", "adapted", "delta"]
Pooling = Literal["learned_query", "mean"]
LORA_TARGETS = (
    *(f"{attention}.{name}" for attention in ("self_attn", "cross_attn") for name in "qkvo"),
    "ffn.0",
    "ffn.2",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LightWAMConfig:
    """Sizes of a Light-WAM; the defaults are the released 2 B model's."""

    action_dim: int  # numbers per action
    proprio_dim: int | None  # numbers of proprioception; None: no proprio token
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
    taps: tuple[int, ...] = (8, 16, 24)  # blocks after which an adapter stands and features are recorded
    adapter_dim: int = 256
    adapter_scale: float = 1.0
    lora_rank: int = 64  # 0: no LoRA, or merged
    lora_alpha: float = 128.0
    lora_layers: tuple[int, ...] | None = None  # None: all
    lora_targets: tuple[str, ...] = LORA_TARGETS
    features: tuple[tuple[Feature, ...], ...] = (("adapted",),) * 3  # what the head reads of each tap
    pooling: Pooling = "learned_query"
    queries: int = 16
    pool_heads: int = 8
    merge_dim: int | None = None  # None: the queries' answers become one vector by a weighted mean
    merge_slots: int = 2
    layer_dim: int = 4608
    trunk_dim: int = 6144
    trunk_blocks: int = 1
    step_dim: int = 256
    video_pool: int = 2  # latent pixels whose square is averaged for the video's supervision

    def __post_init__(self) -> None:
        outside = [tap for tap in self.taps if not 0 <= tap < self.layers]
        if outside or list(self.taps) != sorted(set(self.taps)) or not self.taps:
            raise ConfigError(f"taps must be blocks 0 … {self.layers - 1} in rising order, got {list(self.taps)}")
        if len(self.features) != len(self.taps) or not all(self.features):
            raise ConfigError(f"each of the {len(self.taps)} taps needs its features, got {self.features}")
        unknown = {source for sources in self.features for source in sources} - set(get_args(Feature))
        if unknown or self.pooling not in get_args(Pooling):
            raise ConfigError(f"unknown features {sorted(unknown)} or pooling {self.pooling!r}")
        if self.pooling == "learned_query" and self.video_dim % self.pool_heads:
            raise ConfigError(f"{self.pool_heads} pooling heads don't divide the width {self.video_dim}")
        if self.lora_rank < 0 or set(self.lora_targets) - set(LORA_TARGETS):
            raise ConfigError(f"LoRA of rank {self.lora_rank} on {self.lora_targets}; targets are {LORA_TARGETS}")
        if self.head_dim % 2 or self.freq_dim % 2 or self.step_dim % 2:
            raise ConfigError("`head_dim`, `freq_dim` and `step_dim` must be even")

    def lora_paths(self) -> list[str]:
        """Paths of the adapted layers inside the video expert."""
        layers = range(self.layers) if self.lora_layers is None else self.lora_layers
        return [f"blocks.{i}.{target}" for i in layers for target in self.lora_targets]


def shared(config: FastWAMConfig | LightWAMConfig) -> SharedSizes:
    """The sizes of a transformer but its widths, which the experts of a model share to attend to each other."""
    return SharedSizes(
        layers=config.layers,
        heads=config.heads,
        head_dim=config.head_dim,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        eps=config.eps,
    )
