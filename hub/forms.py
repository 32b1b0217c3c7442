"""The forms a Light-WAM is written in: all of it, only what was trained, or what acting needs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch

from wam_policy.config import Form, Source
from wam_policy.errors import ConfigError
from wam_policy.hub import frozen_base
from wam_policy.hub.checkpoint import PolicyParts
from wam_policy.models.light_wam.fold import fold_to_lean
from wam_policy.models.light_wam.model import LightWAM, is_trainable


def to_form(
    parts: PolicyParts,
    form: Form | None,
    base: Source | None,
    dtype: torch.dtype | None,
    folder: Path,
) -> PolicyParts:
    """The parts of a policy as `checkpoint.write` is to write them.

    Args:
        parts: the policy's.
        form: "fat": every weight. "slim": what was trained; the frozen rest is named by place and hash. "lean": LoRA merged,
            constants folded, what no action depends on left out. None: the form the policy has.
        base: where a slim checkpoint's frozen weights can be had; None: where the policy has them from.
        dtype: what weights will be stored in; None: what they are.
        folder: where they will be.

    Raises:
        ConfigError: the policy has no such form, or a slim one's base isn't said.
        CheckpointError: a slim one's base can't be found, or is another.
    """
    config, model = parts.config, parts.model
    wanted = config.form if form is None else form
    if wanted not in get_args(Form):
        raise ConfigError(f"unknown form {form!r}; there are {get_args(Form)}")
    if base is not None and wanted != "slim":
        raise ConfigError(f"only a slim checkpoint has a base, this one is to be {wanted}")
    if wanted == config.form and wanted != "slim":
        return parts
    if not isinstance(model, LightWAM) or model.config.lean_steps is not None:
        raise ConfigError(
            f"only a whole Light-WAM can be made {wanted}; this is a {config.form} {config.family}"
        )
    if wanted == "fat":
        return replace(parts, config=replace(config, base=None))
    if wanted == "lean":
        small = fold_to_lean(model, config.action.horizon)
        return replace(parts, config=replace(config, base=None, model=small.config), model=small)
    held = {name: x for name, x in model.state_dict().items() if not is_trainable(name)}
    source = base if base is not None or config.base is None else config.base.source
    if source is None:
        raise ConfigError(
            "a slim checkpoint names its frozen weights: say where they are, `base=Source(repo=…)`"
        )
    frozen_base.refuse_own(source, folder)
    if base is None and config.base is not None and frozen_base.matches_base(config.base, held):
        return parts
    return replace(
        parts, config=replace(config, base=frozen_base.make_base(held, source, dtype, folder))
    )
