"""Shows what a Light-WAM's action head looks at: attention of its learned queries, as heat maps over the camera pictures."""

# B batch, K taps, Q queries, T actions in a chunk, A numbers per action, H W pixels of the canvas

from __future__ import annotations

import numpy as np


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
