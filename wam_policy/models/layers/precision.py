"""Where a model rounds."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Precision(NamedTuple):
    """Where a model rounds; spec/fastwam.md section 2.2."""

    rope: torch.dtype  # rotary tables, and what rotations are computed in
    time: torch.dtype | None  # timesteps, step sizes and what is denoised; None: the weights' dtype
    fused_norm: bool  # True: one kernel, rounded once; False: rounded before the weight is applied


REFERENCE = Precision(
    rope=torch.float64, time=None, fused_norm=False
)  # as the released weights were trained and evaluated


FAST = Precision(rope=torch.float32, time=torch.float32, fused_norm=True)


PRECISIONS = {"reference": REFERENCE, "fast": FAST}
