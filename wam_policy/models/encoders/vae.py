"""The frozen video codec: diffusers' `AutoencoderKLWan` with standardised latents.

See docs/method.md, "Encoders", and `autoencoder_kl_wan.py` in diffusers.
"""

# B batch, F pixel frames (1 + ratio·n), f latent frames (1 + n), C latent channels,
# H W pixels, h w latent grid

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wam_policy.errors import ConfigError, ObservationError
from wam_policy.models.encoders.first_frame import FirstFrameEncoder
from wam_policy.models.layers.linear import is_slow_bfloat16
from wam_policy.utils.locks import PicklableLock

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

# Keys of the released codecs' configurations without an effect here: `decode` always clamps.
INERT = {"clip_output"}


class VAE(nn.Module):
    """Encoder and decoder between pixels in [-1, 1] and standardised latents.

    Encoding is deterministic: it returns the mean of the posterior. Several threads may use one
    codec: they wait for each other, because diffusers' codec keeps features of the clip on itself.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: AutoencoderKLWan,
        load_decoder: Callable[[], None] | None = None,
    ) -> None:
        """Wrap a codec of diffusers.

        Args:
            model: Codec.
            load_decoder: Function that loads the weights of the codec's decoder, called before the
                first decoding; None: they are loaded.
        """
        super().__init__()
        self.model = model
        self._lock = PicklableLock()
        self._load_decoder = load_decoder
        # Built from the codec's encoder when it is first needed.
        self._first_frame: FirstFrameEncoder | None = None
        self.spatial_ratio = int(model.config["scale_factor_spatial"])
        self.temporal_ratio = int(model.config["scale_factor_temporal"])

        for name in ("mean", "std"):
            values = model.config[f"latents_{name}"]
            # Numbers of the configuration, also for a codec that is built on the `meta` device.
            statistic = torch.tensor(values, dtype=torch.float32, device="cpu")
            statistic = statistic.view(1, -1, 1, 1, 1)
            self.register_buffer(name, statistic, persistent=False)

    def encode(self, video: Tensor) -> Tensor:
        """Encode clips.

        Args:
            video: [B, 3, F, H, W] float in [-1, 1], F = 1 + `temporal_ratio`·n.

        Returns:
            [B, C, f, h, w] standardised latents in the type of the video.

        Raises:
            ObservationError: The codec cannot encode clips of this size.
        """
        self._check_size(*video.shape[2:])
        with self._lock:
            posterior = self.model.encode(video.to(self.model.dtype)).latent_dist
        latents = posterior.mode()
        centered = latents - self.mean.to(latents.dtype)
        inverse_std = (1 / self.std).to(latents.dtype)
        return (centered * inverse_std).to(video.dtype)

    def _check_size(self, frames: int, height: int, width: int) -> None:
        """Check that the codec can downsample a clip of this size without a remainder."""
        valid_length = (frames - 1) % self.temporal_ratio == 0
        valid_size = height % self.spatial_ratio == 0 and width % self.spatial_ratio == 0
        if not valid_length or not valid_size:
            raise ObservationError(
                f"the codec encodes 1 + {self.temporal_ratio}·n frames whose height and width are "
                f"multiples of {self.spatial_ratio}, got {frames} frames of {height}×{width}"
            )

    def encode_first_frame(self, image: Tensor) -> Tensor:
        """Encode single images as the first latent frame of any clip that begins with them.

        Args:
            image: [B, 3, H, W] in [-1, 1].

        Returns:
            [B, C, 1, h, w] standardised latents in the type of the image.

        Raises:
            ObservationError: The codec cannot encode images of this size.
        """
        self._check_size(1, *image.shape[2:])
        encoder = self.first_frame_encoder
        return encoder(image.to(encoder.dtype)).to(image.dtype)

    @property
    def first_frame_encoder(self) -> FirstFrameEncoder:
        """Encoder of single images, built on first use.

        It is in float32 where bfloat16 convolutions are about a hundred times slower.
        """
        # Compiled code finds it built: a lock cannot be compiled.
        if self._first_frame is None:
            self._build_first_frame_encoder()
        assert self._first_frame is not None
        return self._first_frame

    def _build_first_frame_encoder(self) -> None:
        """Build the encoder of single images; of several threads, the first one does."""
        with self._lock:
            if self._first_frame is None:
                encoder = FirstFrameEncoder(self.model, self.mean, self.std)
                if is_slow_bfloat16(next(encoder.parameters())):
                    # A copy: it shares its 2-D layers with the codec, whose type must not change.
                    encoder = copy.deepcopy(encoder).float()
                self._first_frame = encoder

    def decode(self, latents: Tensor) -> Tensor:
        """Decode clips.

        Args:
            latents: [B, C, f, h, w] standardised latents.

        Returns:
            [B, 3, F, H, W] in [-1, 1], in the type of the codec.
        """
        self.load_decoder()
        latents = latents.to(self.model.dtype)
        std = self.std.to(latents.dtype)
        mean = self.mean.to(latents.dtype)
        raw = latents * std + mean
        with self._lock:
            return self.model.decode(raw).sample.clamp(-1, 1)

    def load_decoder(self) -> None:
        """Load the weights of the decoder if they are not loaded; acting does not need them."""
        with self._lock:
            if self._load_decoder is not None:
                self._load_decoder()
                self._load_decoder = None


def build_vae(config: dict[str, Any]) -> VAE:
    """Build a codec with new weights.

    Args:
        config: Configuration of diffusers' `AutoencoderKLWan`.

    Raises:
        ConfigError: The installed diffusers does not know a key of the configuration.
    """
    from diffusers import AutoencoderKLWan

    # Keys with a leading underscore are metadata of diffusers.
    parameters = inspect.signature(AutoencoderKLWan.__init__).parameters
    options = {name: value for name, value in config.items() if not name.startswith("_")}

    unknown = sorted(options.keys() - parameters.keys() - INERT)
    if unknown:
        raise ConfigError(
            f"the codec's configuration holds {unknown}, which the installed diffusers does not "
            f"know: pip install -U diffusers"
        )
    known = {name: value for name, value in options.items() if name in parameters}
    return VAE(AutoencoderKLWan(**known))
