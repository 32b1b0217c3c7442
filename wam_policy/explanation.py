"""Shows what a Light-WAM's action head looks at: attention of its learned queries, as heat maps over the camera pictures."""

# B batch, K taps, Q queries, T actions in a chunk, A numbers per action, H W pixels of the canvas

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # PyTorch's own name for it
from torch import Tensor

from wam_policy.errors import ConfigError
from wam_policy.models.build import Model
from wam_policy.models.lean import LeanPooler
from wam_policy.models.light_wam import LightWAM
from wam_policy.models.state_fusion import QueryPooler
from wam_policy.models.video_dit import token_grid


def explainable(model: Model) -> LightWAM:
    """The model, if there is something to show.

    Raises:
        ConfigError: there isn't.
    """
    if not isinstance(model, LightWAM) or model.config.pooling != "learned_query":
        raise ConfigError("only a Light-WAM that pools by learned queries can be explained")
    return model


@torch.no_grad()
def explain(
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
    taps = model.states(first, model.video.embed_text(context))
    grid = token_grid(first, model.config.patch_size)[1:]
    maps, weights = [], []
    for tap, poolers in zip(taps, model.expert.layer_poolers, strict=True):
        assert isinstance(poolers, torch.nn.ModuleDict)
        for source, pooler in poolers.items():
            assert isinstance(pooler, QueryPooler | LeanPooler)
            maps.append(pooler.attention(tap[source]).mean(1).unflatten(-1, grid))  # [B, Q, rows, columns]
            weights.append(pooler.merge_weights().mean(0))
    small = torch.stack(maps, dim=1).float()
    large = F.interpolate(small.flatten(0, 1), size=canvas, mode="bilinear", align_corners=False)
    counts = torch.stack(weights).float().cpu().numpy()
    return model.expert(taps, horizon), large.unflatten(0, small.shape[:2]).cpu().numpy(), counts


def heat(picture: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """A picture, uint8 [H, W, 3], under a map [H, W] of any scale: grey where nothing is looked at, red where most is."""
    level = (attention - attention.min()) / max(float(np.ptp(attention)), 1e-12)
    grey = picture.mean(-1, keepdims=True).repeat(3, -1)
    red = np.array([255.0, 40.0, 0.0])
    weight = 0.7 * level[..., None]
    return ((1 - weight) * grey + weight * red).clip(0, 255).astype(np.uint8)


def overlay(picture: np.ndarray, maps: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """A canvas, uint8 [H, W, 3], above its maps [K, Q, H, W], each tap's queries weighted by [K, Q], as one picture."""
    taps = np.einsum("kq,kqhw->khw", weights, maps)
    return np.concatenate([picture, *(heat(picture, tap) for tap in taps)], axis=0)
