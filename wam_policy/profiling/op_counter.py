"""Counts what a function costs from the shapes it meets: operations, bytes, kernels, memory; on real or fake tensors.

A kernel is an operator that does more than look at memory another way; a compiler fuses many of them into one.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_flop_count

MATRIX = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "wide_linear",
    "convolution",
    "_scaled_dot_product",
)  # operators whose cost is products
SYNCS = (
    "_local_scalar_dense",
    "item",
    "nonzero",
    "is_nonzero",
)  # operators that wait for the device


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
def _cpu_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


@register_flop_formula(torch.ops.wam_policy.wide_linear)
def _wide_linear(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


@dataclass
class Counts:
    """What a function costs."""

    flops: int = 0  # of matrix products, convolutions and attention; a multiplication and an addition are two
    bytes: int = 0  # that products read and write
    kernels: int = 0
    peak: int = 0  # bytes of what was alive at once and made inside
    syncs: int = 0  # operators that wait for the device
    copies: int = 0  # from one device to another
    operators: Counter[str] = field(default_factory=Counter)

    def minus(self, other: Counts) -> Counts:
        """What is left of the sums without another's; the peak stays."""
        sums = {
            name: getattr(self, name) - getattr(other, name)
            for name in ("flops", "bytes", "kernels", "syncs", "copies")
        }
        return Counts(**sums, peak=self.peak, operators=self.operators - other.operators)


def _bytes(tensors: list[Any]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts, self._alive, self._now = Counts(), set[int](), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name, counts = func.__name__.split(".")[0], self.counts
        inputs, outputs = (
            tree_leaves((args, kwargs)),
            [x for x in tree_leaves(result) if isinstance(x, Tensor)],
        )
        counts.syncs += name in SYNCS
        if func.is_view or not outputs:
            return result
        counts.kernels += 1
        counts.operators[name] += 1
        counts.copies += (
            len({x.device for x in (*inputs, *outputs) if isinstance(x, Tensor) and x.ndim}) > 1
        )
        if func._overloadpacket in flop_registry:
            counts.flops += flop_registry[func._overloadpacket](
                *args, **(kwargs or {}), out_val=result
            )
        if name.startswith(MATRIX):
            counts.bytes += _bytes(inputs) + _bytes(outputs)
        for x in outputs:
            self._track(x)
        counts.peak = max(counts.peak, self._now)
        return result

    def _track(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        self._alive.add(key)
        size = storage.nbytes()
        self._now += size
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self._now -= size


@torch.no_grad()
def count_operations(function: Callable[[], Any]) -> Counts:
    """Run a function and count."""
    with _Counting() as counting:
        function()
    return counting.counts
