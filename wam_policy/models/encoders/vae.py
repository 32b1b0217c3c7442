"""The frozen video codec: diffusers' `AutoencoderKLWan` behind encode and decode, with the latent statistics applied.

Sources: spec/fastwam.md section 4.1; diffusers `autoencoder_kl_wan.py`.
"""

# B batch, F pixel frames (1 + ratio·n), f latent frames (1 + n), C latent channels, H W pixels, h w latent grid

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wam_policy.errors import ConfigError, ObservationError
from wam_policy.models.encoders.first_frame import FirstFrameEncoder
from wam_policy.models.layers.linear import computes_in_float32

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

INERT = {
    "clip_output"
}  # in the released codecs' configs; what the decoder gives is clamped here whatever it says


class VAE(nn.Module):
    """Pixels in [-1, 1] to standardised latents and back; deterministic (the posterior's mean)."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: AutoencoderKLWan, load_decoder: Callable[[], None] | None = None
    ) -> None:
        """Put the codec behind encode and decode.

        Args:
            model: the codec.
            load_decoder: what gives its decoder the weights when it is first needed; None: it has them.
        """
        super().__init__()
        self.model, self._load_decoder = model, load_decoder
        self._first_frame: FirstFrameEncoder | None = (
            None  # made of the encoder when it is first used
        )
        self.spatial_ratio = int(model.config["scale_factor_spatial"])
        self.temporal_ratio = int(model.config["scale_factor_temporal"])
        for name in ("mean", "std"):
            values = torch.tensor(model.config[f"latents_{name}"]).view(1, -1, 1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def encode(self, video: Tensor) -> Tensor:
        """Encode clips.

        Args:
            video: [B, 3, F, H, W] float in [-1, 1], F = 1 + `temporal_ratio`·n.

        Returns:
            [B, C, f, h, w] standardised latents in the video's dtype.

        Raises:
            ObservationError: a size the codec can't halve evenly.
        """
        self._check(*video.shape[2:])
        mean = self.model.encode(video.to(self.model.dtype)).latent_dist.mode()
        return ((mean - self.mean.to(mean.dtype)) * (1 / self.std).to(mean.dtype)).to(video.dtype)

    def _check(self, frames: int, height: int, width: int) -> None:
        if (
            (frames - 1) % self.temporal_ratio
            or height % self.spatial_ratio
            or width % self.spatial_ratio
        ):
            raise ObservationError(
                f"the codec takes 1 + {self.temporal_ratio}·n frames whose sides are multiples of {self.spatial_ratio}, "
                f"got {frames} frames of {height}×{width}"
            )

    def encode_first_frame(self, image: Tensor) -> Tensor:
        """Encode single pictures [B, 3, H, W] as [B, C, 1, h, w]: the first latent frame of any clip they begin.

        Raises:
            ObservationError: a size the codec can't halve evenly.
        """
        self._check(1, *image.shape[2:])
        encoder = self.first_frame_encoder
        return encoder(image.to(encoder.dtype)).to(image.dtype)

    @property
    def first_frame_encoder(self) -> FirstFrameEncoder:
        """The encoder of single pictures; in float32 on a CPU whose bfloat16 convolutions are some hundred times slower."""
        if self._first_frame is None:
            encoder = FirstFrameEncoder(self.model, self.mean, self.std)
            slow = computes_in_float32(next(encoder.parameters()))
            self._first_frame = (
                copy.deepcopy(encoder).float() if slow else encoder
            )  # its plain 2-D layers are the codec's own
        return self._first_frame

    def decode(self, latents: Tensor) -> Tensor:
        """Standardised latents [B, C, f, h, w] -> clips [B, 3, F, H, W] in the codec's dtype, clamped to [-1, 1]."""
        self.load_decoder()
        latents = latents.to(self.model.dtype)
        raw = latents * self.std.to(latents.dtype) + self.mean.to(latents.dtype)
        return self.model.decode(raw).sample.clamp(-1, 1)

    def load_decoder(self) -> None:
        """Load the decoder if it isn't there yet; acting alone never needs it."""
        if self._load_decoder is not None:
            self._load_decoder()
            self._load_decoder = None


def build_vae(config: dict[str, Any]) -> VAE:
    """An untrained codec of diffusers' configuration `config`; any width, any number of latent channels."""
    from diffusers import AutoencoderKLWan

    known = inspect.signature(AutoencoderKLWan.__init__).parameters
    public = {name: value for name, value in config.items() if not name.startswith("_")}
    if unknown := sorted(public.keys() - known.keys() - INERT):
        raise ConfigError(
            f"the codec's config holds {unknown}, which this diffusers doesn't know: pip install -U diffusers"
        )
    return VAE(AutoencoderKLWan(**{name: value for name, value in public.items() if name in known}))
