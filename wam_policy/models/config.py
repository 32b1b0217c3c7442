"""Sizes of the models: everything their parameters' shapes depend on."""

from __future__ import annotations

from dataclasses import dataclass, fields
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
        check_sizes(self)


def check_sizes(config: FastWAMConfig | LightWAMConfig, may_be_zero: tuple[str, ...] = ()) -> None:
    """Refuse sizes that no model can have."""
    sizes = {f.name: getattr(config, f.name) for f in fields(config)}
    wrong = {
        n: x
        for n, x in sizes.items()
        if isinstance(x, int) and x < 1 and not (x == 0 and n in may_be_zero)
    }
    if wrong or min(config.patch_size) < 1 or not config.eps > 0:
        raise ConfigError(
            f"model sizes must be positive, got {wrong or {n: sizes[n] for n in ('patch_size', 'eps')}}"
        )
    odd = {n: sizes[n] for n in ("head_dim", "freq_dim", "step_dim") if sizes.get(n, 0) % 2}
    if odd:
        raise ConfigError(f"{' and '.join(f'`{n}`' for n in odd)} must be even, got {odd}")
    if config.patch_size[0] != 1:
        raise ConfigError(
            f"patches must be one latent frame long, got `patch_size` {config.patch_size}"
        )


VIDEO_EXPERT_SIZES = (  # the sizes of a video expert's trunk
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
    taps: tuple[int, ...] = (
        8,
        16,
        24,
    )  # blocks after which an adapter stands and features are recorded
    adapter_dim: int = 256
    adapter_scale: float = 1.0
    lora_rank: int = 64  # 0: no LoRA, or merged
    lora_alpha: float = 128.0
    lora_layers: tuple[int, ...] | None = None  # None: all
    lora_targets: tuple[str, ...] = LORA_TARGETS
    features: tuple[tuple[Feature, ...], ...] = (
        ("adapted",),
    ) * 3  # what the head reads of each tap
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
    lean_steps: int | None = (
        None  # a lean model, which acts only: so many steps of a chunk are known; None: as trained
    )

    def __post_init__(self) -> None:
        check_sizes(self, may_be_zero=("lora_rank", "trunk_blocks"))
        outside = [tap for tap in self.taps if not 0 <= tap < self.layers]
        if outside or list(self.taps) != sorted(set(self.taps)) or not self.taps:
            raise ConfigError(
                f"taps must be blocks 0 … {self.layers - 1} in rising order, got {list(self.taps)}"
            )
        if len(self.features) != len(self.taps) or not all(self.features):
            raise ConfigError(
                f"each of the {len(self.taps)} taps needs its features, got {self.features}"
            )
        unknown = {source for sources in self.features for source in sources} - set(
            get_args(Feature)
        )
        if unknown or self.pooling not in get_args(Pooling):
            raise ConfigError(f"unknown features {sorted(unknown)} or pooling {self.pooling!r}")
        if self.pooling == "learned_query" and self.video_dim % self.pool_heads:
            raise ConfigError(
                f"{self.pool_heads} pooling heads don't divide the width {self.video_dim}"
            )
        if self.lora_rank < 0 or set(self.lora_targets) - set(LORA_TARGETS):
            raise ConfigError(
                f"LoRA of rank {self.lora_rank} on {self.lora_targets}; targets are {LORA_TARGETS}"
            )
        if self.lora_layers is not None and not set(self.lora_layers) <= set(range(self.layers)):
            raise ConfigError(
                f"LoRA on blocks {list(self.lora_layers)}; there are blocks 0 … {self.layers - 1}"
            )
        if self.lean_steps is not None and (
            self.lean_steps < 1 or self.lora_rank or self.taps[-1] + 1 != self.layers
        ):
            raise ConfigError(
                "a lean model knows at least one step, has no LoRA and ends at its last tap"
            )

    def lora_paths(self) -> list[str]:
        """Paths of the adapted layers inside the video expert."""
        layers = range(self.layers) if self.lora_layers is None else self.lora_layers
        return [f"blocks.{i}.{target}" for i in layers for target in self.lora_targets]


def shared_sizes(config: FastWAMConfig | LightWAMConfig) -> SharedSizes:
    """The sizes of a transformer but its widths, which the experts of a model share to attend to each other."""
    return SharedSizes(
        layers=config.layers,
        heads=config.heads,
        head_dim=config.head_dim,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        eps=config.eps,
    )
