"""A model's twin for inference, whose projections of the same input are one product."""

from __future__ import annotations

import copy

from wam_policy.models.fast_wam import FastWAM


def fused(model: FastWAM) -> FastWAM:
    """A twin that shares the model's memory: the parameters of both are parts of the twin's larger matrices.

    The model itself goes on as before: it can be trained, saved and moved.
    """
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    twin.video.fuse()
    twin.action.fuse()
    return twin.eval()
