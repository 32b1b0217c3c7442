"""Writes the README card of a checkpoint from its contract."""

from __future__ import annotations

from wam_policy.config import PolicyConfig

_TITLES = {"fast_wam": "Fast-WAM"}
_LAYOUTS = {"row": "side by side", "t": "the first at twice that size above the others"}


def contract_rows(config: PolicyConfig) -> dict[str, str]:
    """A contract in words, an aspect a row."""
    layout, sampling, cameras = config.action.layout, config.sampling, config.cameras
    gripper = layout.gripper
    return {
        "Model": f"{_TITLES[config.family]}, variant `{config.variant}`",
        "Cameras": f"{', '.join(cameras.names)}; {cameras.height}×{cameras.width} each, {_LAYOUTS[cameras.layout]}",
        "State": "none" if config.state is None else f"{', '.join(config.state.names)} ({config.state.normalization.mode})",
        "Action": f"{', '.join(layout.names)} ({config.action.normalization.mode}); {layout.control}",
        "Gripper": "none"
        if gripper is None
        else f"`{layout.names[gripper.index]}`: {gripper.open:g} open, {gripper.closed:g} closed",
        "Chunk": f"{config.action.horizon} actions, replanned after {config.action.replan}",
        "Sampling": f"{sampling.steps} steps, shift {sampling.action_shift:g}, {sampling.noise} noise (seed {sampling.seed})",
        "Prompt": f"`{config.prompt.template}`, {config.prompt.token_length} tokens",
    }


def card(config: PolicyConfig, *, load_by: str, notes: str = "") -> str:
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
