"""Sizes of a Fast-WAM: everything its parameters' shapes depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from wam_policy.errors import ConfigError


class SharedSizes(TypedDict):
    """Sizes both experts must agree on to attend to each other."""

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

    def shared(self) -> SharedSizes:
        """The sizes both experts share."""
        return SharedSizes(
            layers=self.layers,
            heads=self.heads,
            head_dim=self.head_dim,
            text_dim=self.text_dim,
            freq_dim=self.freq_dim,
            eps=self.eps,
        )
