"""Low-rank adaptation (LoRA) of the linear layers of an existing module.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021).
`light_wam.fold.merge_lora` merges it back into plain weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor, nn

from wam_policy.errors import ConfigError
from wam_policy.models.layers.linear import Linear


class LoRALinear(Linear):
    """A linear layer plus a low-rank term: `W·x + b + scale·Up(Down(x))`.

    `Up` starts at zero, so a new layer computes what the plain one does.
    """

    def __init__(self, in_features: int, out_features: int, *, rank: int, scale: float) -> None:
        super().__init__(in_features, out_features)
        self.scale = scale
        self.lora_down = Linear(in_features, rank, bias=False)
        self.lora_up = Linear(rank, out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        plain = super().forward(x)
        low_rank = self.lora_up(self.lora_down(x))
        return plain + self.scale * low_rank


def attach_lora(module: nn.Module, targets: Iterable[str], *, rank: int, alpha: float) -> None:
    """Replace linear layers of a module by LoRA layers with the same weights, in place.

    Args:
        module: Module to adapt.
        targets: Paths of linear layers inside the module.
        rank: Rank of the added term.
        alpha: Scale of the added term, times the rank.

    Raises:
        ConfigError: A target does not exist or is not a linear layer.
    """
    for path in targets:
        try:
            plain = module.get_submodule(path)
        except AttributeError as error:
            raise ConfigError(f"LoRA: there is no layer {path!r}") from error
        if not isinstance(plain, nn.Linear):
            raise ConfigError(
                f"LoRA: {path!r}: expected a linear layer, got a {type(plain).__name__}"
            )

        adapted = LoRALinear(plain.in_features, plain.out_features, rank=rank, scale=alpha / rank)
        adapted.weight = plain.weight
        adapted.bias = plain.bias
        module.set_submodule(path, adapted)
