"""The video expert: a Wan DiT over latent frames. Source: spec/fastwam.md section 2.3."""

# B batch, C latent channels, F latent frames, h w latent grid, S tokens, D width

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from wam_policy.errors import ObservationError
from wam_policy.models.config import FastWAMConfig, LightWAMConfig, shared_sizes
from wam_policy.models.layers.linear import Linear
from wam_policy.models.layers.mot import Stream
from wam_policy.models.layers.precision import Precision
from wam_policy.models.layers.rope import Rope, video_rope
from wam_policy.models.layers.transformer import (
    DiT,
    SharedInput,
    SharedText,
    Text,
    TimeEmbedding,
    modulate,
)


class Head(nn.Module):
    """Modulated norm and projection from tokens to latent patches."""

    def __init__(self, dim: int, out_dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.head = Linear(dim, out_dim)
        self.modulation = nn.Parameter(
            nn.init.trunc_normal_(self.head.weight.new_empty(1, 2, dim), std=dim**-0.5)
        )

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Tokens [B, S, D] and time embedding [B, G, D] -> patches [B, S, out]."""
        shift, scale = (self.modulation.unsqueeze(1) + time.unsqueeze(2)).unbind(2)
        return self.head(modulate(F.layer_norm(x, x.shape[-1:], eps=self.eps), shift, scale))


def token_grid(latents: Tensor, patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """Token grid (frames, rows, columns) of latents [B, C, F, h, w].

    Raises:
        ObservationError: they can't be cut into whole patches.
    """
    sizes = latents.shape[2:]
    if any(n % p for n, p in zip(sizes, patch, strict=True)):
        raise ObservationError(
            f"latents {list(sizes)} can't be cut into patches of {list(patch)}; use another canvas"
        )
    frames, rows, columns = (n // p for n, p in zip(sizes, patch, strict=True))
    return frames, rows, columns


def embed_patches(patches: nn.Conv3d, latents: Tensor) -> Tensor:
    """Latents [B, C, F, h, w] -> tokens [B, S, D], frame by frame, row by row; laid out as later blocks' are."""
    tokens = patches(latents.to(patches.weight.dtype)).flatten(2).transpose(1, 2)
    return tokens.clone(memory_format=torch.contiguous_format)


class VideoDiT(DiT):
    """Embeds latent frames as tokens and reads tokens back as latent frames."""

    def __init__(self, config: FastWAMConfig | LightWAMConfig, precision: Precision) -> None:
        super().__init__(
            dim=config.video_dim,
            ffn_dim=config.video_ffn_dim,
            **shared_sizes(config),
            precision=precision,
        )
        self.patch = config.patch_size
        self.channels = config.latent_channels
        self.patch_embedding = nn.Conv3d(self.channels, self.dim, self.patch, self.patch)
        self.head = Head(
            self.dim, self.channels * self.patch[0] * self.patch[1] * self.patch[2], self.eps
        )

    def grid(self, latents: Tensor) -> tuple[int, int, int]:
        """Token grid (frames, rows, columns) of latents [B, C, F, h, w]."""
        return token_grid(latents, self.patch)

    def embed_clip_time(self, t: Tensor, frames: int) -> TimeEmbedding:
        """Timesteps [B] of a clip's later frames -> the embedding of all its `frames`; the first one is clean, at 0."""
        later = t.unsqueeze(1)
        return self.embed_time(
            torch.cat((torch.zeros_like(later), later.expand(-1, frames - 1)), dim=1)
        )

    def rope(self, latents: Tensor, start: int = 0) -> Rope:
        """Rotary tables of the tokens of latents [B, C, F, h, w] that begin at frame `start`."""
        return video_rope(
            self.grid(latents), self.head_dim, latents.device, self.precision.rope, start
        )

    def stream(
        self,
        latents: Tensor,
        modulations: Sequence[Tensor | SharedInput],
        rope: Rope,
        text: Text | SharedText,
    ) -> Stream:
        """Latents [B, C, F, h, w] -> the stream of their tokens.

        Args:
            latents: the frames.
            modulations: of their timesteps, per block [B or 1, F or 1, 6, D], from `modulations`.
            rope: of their tokens, from `rope`.
            text: from `embed_text` or `shared_text`.
        """
        return Stream(self, embed_patches(self.patch_embedding, latents), modulations, rope, text)

    def decode(self, x: Tensor, time: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Tokens [B, S, D] and time embedding [B, F, D] -> velocity [B, C, F, h, w]."""
        patches = self.head(x, time).unflatten(1, grid).unflatten(-1, (*self.patch, self.channels))
        b, f, r, c, pf, pr, pc, channels = patches.shape
        return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(b, channels, f * pf, r * pr, c * pc)
