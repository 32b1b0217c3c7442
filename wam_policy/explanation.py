"""Shows what a Light-WAM's action head looks at: attention of its learned queries, as heat maps over the camera pictures."""

# B batch, K taps, Q queries, H W pixels of the canvas or of a camera's place on it

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # PyTorch's own name for it
from torch import Tensor

from wam_policy.models.lean import LeanPooler
from wam_policy.models.light_wam import LightWAM
from wam_policy.models.state_fusion import QueryPooler
from wam_policy.models.video_dit import token_grid


@torch.no_grad()
def attention_maps(model: LightWAM, first: Tensor, context: Tensor, canvas: tuple[int, int]) -> np.ndarray:
    """How much each query of each tap attends to each place of the canvas, averaged over the heads.

    Args:
        model: one that pools by learned queries.
        first: [B, C, 1, h, w] latents of the observed frames.
        context: [B, L + 1, text_dim], from `model.context()`.
        canvas: height and width of the canvas.

    Returns:
        float32 [B, K, Q, H, W], between the tokens interpolated; each map's tokens sum to 1. A tap that is read in several
        features counts once for each.
    """
    grid = token_grid(first, model.config.patch_size)[1:]
    maps = []
    for tap, poolers in zip(model.states(first, model.video.embed_text(context)), model.expert.layer_poolers, strict=True):
        assert isinstance(poolers, torch.nn.ModuleDict)
        for source, pooler in poolers.items():
            assert isinstance(pooler, QueryPooler | LeanPooler)
            maps.append(pooler.attention(tap[source]).mean(1).unflatten(-1, grid))  # [B, Q, rows, columns]
    small = torch.stack(maps, dim=1).float()
    large = F.interpolate(small.flatten(0, 1), size=canvas, mode="bilinear", align_corners=False)
    return large.unflatten(0, small.shape[:2]).cpu().numpy()


def heat(picture: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """A picture, uint8 [H, W, 3], under a map [H, W] of any scale: grey where nothing is looked at, red where most is."""
    level = (attention - attention.min()) / max(float(np.ptp(attention)), 1e-12)
    grey = picture.mean(-1, keepdims=True).repeat(3, -1)
    red = np.array([255.0, 40.0, 0.0])
    weight = 0.7 * level[..., None]
    return ((1 - weight) * grey + weight * red).clip(0, 255).astype(np.uint8)


def overlay(picture: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """A canvas, uint8 [H, W, 3], above its maps [K, Q, H, W], each tap's averaged over its queries, as one picture."""
    return np.concatenate([picture, *(heat(picture, tap.mean(0)) for tap in maps)], axis=0)


def watch(policy: Any, env: Any, seed: int) -> list[np.ndarray]:
    """Play one episode in a wrapped vector env of one, and draw at every replanning what was looked at, as frames of a film."""
    observation, _ = env.reset(seed=[seed])
    frames: list[np.ndarray] = []
    while True:
        chunk, canvas, maps = policy.explain(observation)
        frames.append(overlay(canvas[0], maps[0]))
        for step in range(policy.spec.action.replan):
            observation, _, terminated, truncated, _ = env.step(chunk[:, step])
            if terminated[0] or truncated[0]:
                return frames
