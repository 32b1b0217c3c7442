"""The forms a Light-WAM is written in: all of it, only what was trained, or what acting needs."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import torch

from wam_policy.config import Form, Source
from wam_policy.errors import ConfigError
from wam_policy.hub import slim
from wam_policy.hub.checkpoint import Parts
from wam_policy.models.fold import lean
from wam_policy.models.light_wam import LightWAM


def shaped(parts: Parts, form: Form, base: Source | None, dtype: torch.dtype | None) -> Parts:
    """The parts of a policy as `checkpoint.write` is to write them.

    Args:
        parts: the policy's.
        form: "fat": every weight. "slim": what was trained; the frozen rest is named by place and hash. "lean": LoRA merged,
            constants folded, what no action depends on left out.
        base: where a slim checkpoint's frozen weights can be had; None: where the policy has them from.
        dtype: what weights will be stored in; None: what they are.

    Raises:
        ConfigError: the policy has no such form.
    """
    config, model = parts.config, parts.model
    if form not in get_args(Form):
        raise ConfigError(f"unknown form {form!r}; there are {get_args(Form)}")
    if base is not None and form != "slim":
        raise ConfigError(f"only a slim checkpoint has a base, this one is to be {form}")
    if form == "fat":
        return replace(parts, config=replace(config, base=None))
    if not isinstance(model, LightWAM) or model.config.lean_steps is not None:
        raise ConfigError(f"only a whole Light-WAM has the form {form!r}; this is a {config.form} {config.family}")
    if form == "slim":
        return replace(parts, config=replace(config, base=slim.base_of(config, model.state_dict(), base, dtype)))
    small = lean(model, config.action.horizon)
    return replace(parts, config=replace(config, base=None, model=small.config), model=small)
