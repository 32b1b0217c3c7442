"""A linear layer that is fast in bfloat16 also on a CPU without bfloat16 instructions.

There PyTorch multiplies bfloat16 matrices some five times slower than float32 ones. Instead the weight is widened a piece at a
time, so that it is still in the cache when it is multiplied; sums are in float32 and rounded once, as a bfloat16 kernel's are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F  # noqa: N812  # PyTorch's own name for it
from torch import Tensor, nn

SLOW_BFLOAT16 = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
ROWS_PER_PIECE = 256  # rows of a weight


def computes_in_float32(x: Tensor) -> bool:
    """Whether what is computed of `x` is computed in float32: it is bfloat16, on a CPU that is slow at it."""
    return SLOW_BFLOAT16 and x.dtype == torch.bfloat16 and x.device.type == "cpu"


@torch.library.custom_op("wam_policy::wide_linear", mutates_args=())
def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x·Wᵀ + b` of bfloat16 tensors [..., in], [out, in] and [out] (None: 0)."""
    rows = x.flatten(0, -2).float()
    out = x.new_empty(len(rows), len(weight))
    for start in range(0, len(weight), ROWS_PER_PIECE):
        piece = slice(start, start + ROWS_PER_PIECE)
        out[:, piece] = F.linear(
            rows, weight[piece].float(), None if bias is None else bias[piece].float()
        )
    return out.unflatten(0, x.shape[:-1])


@wide_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`; where gradients aren't wanted, by the faster of the two ways."""
    if (
        computes_in_float32(x)
        and not torch.is_grad_enabled()
        and type(weight) in (Tensor, nn.Parameter)
    ):  # not a quantized one
        return wide_linear(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return linear(x, self.weight, self.bias)


class FusedLinear(nn.Module):
    """Several linear layers of the same input and output width, computed as one product.

    The layers keep their parameters, which become rows of this module's buffers; see `share_rows`. For inference only:
    gradients do not reach the layers.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, layers: Mapping[str, nn.Linear]) -> None:
        """Join the layers, named in the order of the results."""
        super().__init__()
        self.names = tuple(layers)
        for kind in ("weight", "bias"):
            joined = share_rows([getattr(layer, kind) for layer in layers.values()])
            self.register_buffer(kind, joined, persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """[..., in] -> each layer's [..., out]."""
        return linear(x, self.weight, self.bias).chunk(len(self.names), dim=-1)


@torch.no_grad()
def share_rows(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Join parameters of one shape along their first axis, without a second copy of them.

    Afterwards each parameter is a view of its rows in the result, so that writing to one writes to the other. This is the one
    place where the memory behind a parameter is exchanged. Parameters that lie in one memory already, one after the other,
    stay there.
    """
    joined = _join_rows(parameters)
    for parameter, rows in zip(parameters, joined.chunk(len(parameters)), strict=True):
        parameter.data = rows
    return joined


def _join_rows(parts: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape, one after the other: where they lie so already, that memory, else new memory."""
    first = parts[0]
    storage, size = first.untyped_storage(), first.numel()
    for i, part in enumerate(parts):
        beside = (
            part.untyped_storage()._cdata == storage._cdata
            and part.is_contiguous()
            and part.shape == first.shape
        )
        if not beside or part.storage_offset() != first.storage_offset() + i * size:
            return torch.cat(list(parts))
    shape = (len(parts) * len(first), *first.shape[1:])
    return first.detach().as_strided(shape, first.stride(), first.storage_offset())
