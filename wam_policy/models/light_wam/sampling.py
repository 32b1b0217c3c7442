"""Draws the future that a Light-WAM imagines, on the pooled grid that it learned the future on.

Source: spec/lightwam.md section 3.4, the protocol of the trainer's renderer (upstream's `infer_joint` does another thing).
"""

# B batch, C latent channels, F latent frames, h w pooled latent grid

from __future__ import annotations

import torch
from torch import Tensor

from wam_policy.models import flow_matching
from wam_policy.models.fast_wam.sampling import Schedule
from wam_policy.models.layers.transformer import Text
from wam_policy.models.light_wam.model import LightWAM, pool_latents


def imagine(
    model: LightWAM, first: Tensor, text: Text, noise: Tensor, schedule: Schedule
) -> Tensor:
    """Denoise the frames after the observed one.

    Args:
        model: the model.
        first: [B, C, 1, H, W] latents of the observed frame, not pooled.
        text: from `video.embed_text`.
        noise: [B, C, F − 1, h, w] initial noise, in the schedule's dtype.
        schedule: the steps.

    Returns:
        [B, C, F, h, w] latents, the pooled observed frame first.
    """
    clean, future = pool_latents(first, model.config.video_pool), noise
    for t, delta in zip(*(x.unbind() for x in schedule), strict=True):
        clip = torch.cat((clean, future.to(clean.dtype)), dim=2)
        velocity = model.velocity(clip, t.expand(len(clip)), text)[:, :, 1:]
        future = flow_matching.euler_step(future, velocity, delta)
    return torch.cat((clean, future.to(clean.dtype)), dim=2)
