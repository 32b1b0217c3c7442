"""Builds the model that sizes are of."""

from __future__ import annotations

from wam_policy.models.config import FastWAMConfig, LightWAMConfig
from wam_policy.models.fast_wam import FastWAM
from wam_policy.models.layers import FAST, Precision
from wam_policy.models.light_wam import LightWAM

Model = FastWAM | LightWAM


def build(sizes: FastWAMConfig | LightWAMConfig, precision: Precision = FAST) -> Model:
    """A new model of these sizes; under `torch.device("meta")` without memory of its own."""
    if isinstance(sizes, FastWAMConfig):
        return FastWAM(sizes, precision)
    return LightWAM(sizes, precision)
