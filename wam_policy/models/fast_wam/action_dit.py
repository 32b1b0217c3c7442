"""The action expert: a small transformer over the actions of one chunk.

See docs/method.md, "Action expert".
"""

from __future__ import annotations

from torch import Tensor

from wam_policy.models.config import FastWAMConfig, shared_sizes
from wam_policy.models.layers.linear import Linear
from wam_policy.models.layers.precision import Precision
from wam_policy.models.layers.transformer import DiT


class ActionDiT(DiT):
    """The diffusion transformer of actions.

    Tokens are embedded actions; `head` maps them to velocities [B, T, A]. Both are linear layers
    without a norm or modulation.
    """

    def __init__(self, config: FastWAMConfig, precision: Precision) -> None:
        super().__init__(
            dim=config.action_expert_dim,
            ffn_dim=config.action_expert_ffn_dim,
            **shared_sizes(config),
            precision=precision,
        )
        self.action_encoder = Linear(config.action_dim, self.dim)
        self.head = Linear(self.dim, config.action_dim)

    def embed_actions(self, action: Tensor) -> Tensor:
        """Map noisy actions [B, T, A] to tokens [B, T, D]."""
        dtype = self.action_encoder.weight.dtype
        return self.action_encoder(action.to(dtype))
