"""The video codec's encoder for a single picture: a 2-D network, equal to the causal 3-D one and three times smaller.

Of a lone frame only the last temporal tap of each kernel meets data; temporal downsampling is skipped. The latents' mean and
deviation and the outer 1×1 convolution are folded into the last convolution.
Source: spec/fastwam.md section 7.3, item 13; spec/lightwam.md section 7.3, item 9.
"""

# B batch, C channels, H W pixels, h w latent grid

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812  # PyTorch's own name for it
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan


def conv(layer: nn.Conv3d) -> nn.Conv2d:
    """A causal 3-D convolution as the 2-D one that a lone frame meets."""
    kernel = layer.weight.detach()[:, :, -1]
    size = tuple(kernel.shape[2:])
    return _convolution(kernel, layer.bias, tuple(n // 2 for n in size))


def _convolution(kernel: Tensor, bias: Tensor | None, padding: tuple[int, ...]) -> nn.Conv2d:
    with torch.device("meta"):
        flat = nn.Conv2d(kernel.shape[1], kernel.shape[0], tuple(kernel.shape[2:]), padding=padding)  # type: ignore[arg-type]  # two numbers each
    flat.weight = nn.Parameter(kernel.contiguous(), requires_grad=False)
    flat.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return flat


class ChannelNorm(nn.Module):
    """L2 norm over the channels, times √C and a weight; computed in float32."""

    def __init__(self, gamma: Tensor) -> None:
        super().__init__()
        self.gamma = nn.Parameter(gamma.detach().view(-1, 1, 1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B, C, H, W]."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.normalize(wide, dim=1).to(x.dtype) * x.shape[1] ** 0.5 * self.gamma


class Residual(nn.Module):
    """Norm, SiLU, convolution, twice, beside a shortcut."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.conv1 = ChannelNorm(block.norm1.gamma), conv(block.conv1)
        self.norm2, self.conv2 = ChannelNorm(block.norm2.gamma), conv(block.conv2)
        self.shortcut = (
            conv(block.conv_shortcut)
            if isinstance(block.conv_shortcut, nn.Conv3d)
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H, W]."""
        y = self.conv1(F.silu(self.norm1(x)))
        return self.conv2(F.silu(self.norm2(y))) + self.shortcut(x)


class LoneFrame(nn.Module):
    """A layer over clips, applied to one frame."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W']."""
        return self.layer(x.unsqueeze(2)).squeeze(2)


class Stage(nn.Module):
    """Layers beside an average-pooling shortcut: a stage of Wan 2.2's encoder."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        layers = [Residual(resnet) for resnet in block.resnets]
        self.layers = nn.Sequential(
            *layers, *([] if block.downsampler is None else [block.downsampler.resample])
        )
        self.shortcut = LoneFrame(block.avg_shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W']."""
        return self.layers(x) + self.shortcut(x)


class FirstFrameEncoder(nn.Module):
    """Pictures to standardised latents."""

    def __init__(self, model: AutoencoderKLWan, mean: Tensor, std: Tensor) -> None:
        """Take over an encoder's weights; those of plain 2-D layers are shared.

        Args:
            model: the codec.
            mean: of its latents, [1, C, 1, 1, 1].
            std: likewise.
        """
        super().__init__()
        encoder: Any = model.encoder
        self.patch = int(model.config["patch_size"] or 1)
        middle = encoder.mid_block
        self.layers = nn.Sequential(
            conv(encoder.conv_in),
            *map(_layer, encoder.down_blocks),
            Residual(middle.resnets[0]),
            LoneFrame(middle.attentions[0]),
            Residual(middle.resnets[1]),
            ChannelNorm(encoder.norm_out.gamma),
            nn.SiLU(),
            _standardised(
                conv(encoder.conv_out), conv(model.quant_conv), mean.flatten(), std.flatten()
            ),
        )

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return next(self.parameters()).dtype

    def forward(self, image: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> latents [B, C, 1, h, w]."""
        if self.patch > 1:  # channels of a square of pixels: colour, then column, then row
            squares = image.unflatten(3, (-1, self.patch)).unflatten(
                2, (-1, self.patch)
            )  # [B, 3, h, row, w, column]
            image = squares.permute(0, 1, 5, 3, 2, 4).flatten(1, 3)
        return self.layers(image).unsqueeze(2)


def _layer(block: Any) -> nn.Module:
    """A layer of the 3-D encoder's way down as a 2-D one."""
    if hasattr(block, "avg_shortcut"):
        return Stage(block)
    return block.resample if hasattr(block, "resample") else Residual(block)


def _standardised(out: nn.Conv2d, outer: nn.Conv2d, mean: Tensor, std: Tensor) -> nn.Conv2d:
    """The last convolution, the outer one's rows of the mean, and the standardisation as one convolution."""
    dtype = torch.promote_types(out.weight.dtype, torch.float32)
    assert out.bias is not None and outer.bias is not None
    rows = outer.weight[: len(mean), :, 0, 0].to(dtype) / std.to(dtype).unsqueeze(1)
    kernel = torch.einsum("oi,ichw->ochw", rows, out.weight.to(dtype))
    bias = rows @ out.bias.to(dtype) + (
        outer.bias[: len(mean)].to(dtype) - mean.to(dtype)
    ) / std.to(dtype)
    return _convolution(kernel.to(out.weight.dtype), bias.to(out.weight.dtype), (1, 1))
