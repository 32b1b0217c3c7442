"""Writes the README card of a checkpoint from its contract."""

from __future__ import annotations

from wam_policy.config import Base, PolicyConfig

_TITLES = {"fast_wam": "Fast-WAM", "light_wam": "Light-WAM"}
_FORMS = {"fat": "all weights", "slim": "what was trained", "lean": "folded, for acting only"}
_LAYOUTS = {"row": "side by side", "t": "the first at twice that size above the others"}


def contract_rows(config: PolicyConfig) -> dict[str, str]:
    """A contract in words, an aspect a row."""
    layout, sampling, cameras = config.action.layout, config.sampling, config.cameras
    kind = (
        f", variant `{config.variant}`"
        if config.variant is not None
        else f", {_FORMS[config.form]}"
    )
    chunk = f"{config.action.horizon} actions, replanned after {config.action.replan}"
    if config.action.supervised_steps is not None:
        chunk += f"; only the first {config.action.supervised_steps} were trained"
    if config.action.ensemble is not None:
        chunk += f"; chunks that overlap are averaged (decay {config.action.ensemble:g})"
    sampled = "one pass, no noise"
    if sampling.action_shift is not None:
        sampled = f"{sampling.steps} steps, shift {sampling.action_shift:g}, {sampling.noise} noise (seed {sampling.seed})"
    return {
        "Model": f"{_TITLES[config.family]}{kind}",
        **({} if config.trained_on is None else {"Trained on": config.trained_on}),
        **({} if config.base is None else {"Base": _base(config.base)}),
        "Cameras": f"{', '.join(cameras.names)}; {cameras.height}×{cameras.width} each, {_LAYOUTS[cameras.layout]}",
        "State": "none"
        if config.state is None
        else f"{', '.join(config.state.names)} ({config.state.normalization.mode})",
        "Action": f"{', '.join(layout.names)} ({config.action.normalization.mode}); {layout.control}",
        "Gripper": _gripper(config),
        "Chunk": chunk,
        "Sampling": sampled,
        "Prompt": f"`{config.prompt.template}`, {config.prompt.token_length} tokens",
    }


def _base(base: Base) -> str:
    source = base.source
    place = "".join((source.repo or "", f"/{source.subfolder}" if source.subfolder else ""))
    return f"`{place}`, revision {source.revision or 'main'}, sha256 of the frozen weights in {base.dtype} `{base.sha256}`"


def _gripper(config: PolicyConfig) -> str:
    layout, snap = config.action.layout, config.action.snap
    if snap is not None:
        names = ", ".join(f"`{layout.names[i]}`" for i in snap.indices)
        return f"{names}: rounded, and closed where within {snap.within:g} of it"
    if layout.gripper is None:
        return "none"
    return f"`{layout.names[layout.gripper.index]}`: {layout.gripper.open:g} open, {layout.gripper.closed:g} closed"


def render_card(config: PolicyConfig, *, load_by: str, notes: str = "") -> str:
    """The text of `README.md`: Hub metadata, how to load, the contract in a table, and `notes` (results, recipe)."""
    table = "\n".join(f"| {key} | {value} |" for key, value in contract_rows(config).items())
    return (
        f"""---
library_name: wam-policy
pipeline_tag: robotics
license: apache-2.0
tags:
- robotics
- world-action-model
- {config.family.replace("_", "-")}
---

# {load_by.split("/")[-1]}

```python
from wam_policy import WAMPolicy

policy = WAMPolicy.from_pretrained("{load_by}")
```

| | |
|---|---|
{table}

{notes}""".rstrip()
        + "\n"
    )
