"""Low-rank adaptation of linear layers, attached to a finished module; `fold` merges it back into plain weights.

Source: spec/lightwam.md section 1.3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor, nn

from wam_policy.errors import ConfigError
from wam_policy.models.layers.linear import Linear


class LoRALinear(Linear):
    """A linear layer `W·x + b` plus `scale·Up(Down(x))`; new, it is the plain layer."""

    def __init__(self, in_features: int, out_features: int, *, rank: int, scale: float) -> None:
        super().__init__(in_features, out_features)
        self.scale = scale
        self.lora_down = Linear(in_features, rank, bias=False)
        self.lora_up = Linear(rank, out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [..., in] -> [..., out]."""
        return super().forward(x) + self.scale * self.lora_up(self.lora_down(x))


def attach_lora(module: nn.Module, targets: Iterable[str], *, rank: int, alpha: float) -> None:
    """Put LoRA layers in the place of the linear layers at `targets`, paths inside `module`; their weights are kept.

    Raises:
        ConfigError: a target is no linear layer.
    """
    for path in targets:
        try:
            plain = module.get_submodule(path)
        except AttributeError as error:
            raise ConfigError(f"LoRA: there is no layer {path!r}") from error
        if not isinstance(plain, nn.Linear):
            raise ConfigError(f"LoRA: {path!r} is a {type(plain).__name__}, not a linear layer")
        adapted = LoRALinear(plain.in_features, plain.out_features, rank=rank, scale=alpha / rank)
        adapted.weight, adapted.bias = plain.weight, plain.bias
        module.set_submodule(path, adapted)
