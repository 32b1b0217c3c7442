"""What a Light-WAM's action head attends to: the attention of its learned queries."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # PyTorch's own name for it
from torch import Tensor

from wam_policy.errors import ConfigError
from wam_policy.models.layers.video_dit import token_grid
from wam_policy.models.light_wam.action_head import QueryPooler
from wam_policy.models.light_wam.folded import LeanPooler
from wam_policy.models.light_wam.model import LightWAM
from wam_policy.models.registry import Model


def check_can_explain(model: Model) -> LightWAM:
    """The model, if there is something to show.

    Raises:
        ConfigError: there isn't.
    """
    if not isinstance(model, LightWAM) or model.config.pooling != "learned_query":
        raise ConfigError("only a Light-WAM that pools by learned queries can be explained")
    return model


@torch.no_grad()
def attention_maps(
    model: LightWAM, first: Tensor, context: Tensor, canvas: tuple[int, int], horizon: int
) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Act, and tell how much each query of each tap attends to each place of the canvas, averaged over the heads.

    Args:
        model: one that pools by learned queries.
        first: [B, C, 1, h, w] latents of the observed frames.
        context: [B, L + 1, text_dim], from `model.context()`.
        canvas: height and width of the canvas.
        horizon: actions per chunk.

    Returns:
        Normalised actions [B, T, A]; maps, float32 [B, K, Q, H, W], interpolated between the tokens, whose weights sum to 1;
        and how much each query counts in its tap, float32 [K, Q], rows sum to 1. A tap that is read in several features counts
        once for each.
    """
    taps = model.tap_features(first, model.video.embed_text(context))
    grid = token_grid(first, model.config.patch_size)[1:]
    maps, weights = [], []
    for tap, poolers in zip(taps, model.expert.layer_poolers, strict=True):
        assert isinstance(poolers, torch.nn.ModuleDict)
        for source, pooler in poolers.items():
            assert isinstance(pooler, QueryPooler | LeanPooler)
            maps.append(
                pooler.attention(tap[source]).mean(1).unflatten(-1, grid)
            )  # [B, Q, rows, columns]
            weights.append(pooler.merge_weights().mean(0))
    small = torch.stack(maps, dim=1).float()
    large = F.interpolate(small.flatten(0, 1), size=canvas, mode="bilinear", align_corners=False)
    counts = torch.stack(weights).float().cpu().numpy()
    return model.expert(taps, horizon), large.unflatten(0, small.shape[:2]).cpu().numpy(), counts
