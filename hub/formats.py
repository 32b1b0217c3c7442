"""Foreign checkpoints' tensor names and ours, both directions from one table.

Source: spec/fastwam.md section 1. Below the prefix the names are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

# ours -> upstream's (`payload["mot"]` and `payload["proprio_encoder"]`, joined by a dot)
UPSTREAM = {
    "video.": "mot.mixtures.video.",
    "action.": "mot.mixtures.action.",
    "proprio_encoder.": "proprio_encoder.",
}


def to_ours(tensors: Mapping[str, T], table: Mapping[str, str] = UPSTREAM) -> dict[str, T]:
    """Rename foreign tensors to our names; names the table doesn't know are kept, so that a strict load reports them."""
    return _rename(tensors, {theirs: ours for ours, theirs in table.items()})


def to_theirs(tensors: Mapping[str, T], table: Mapping[str, str] = UPSTREAM) -> dict[str, T]:
    """Rename our tensors to foreign names."""
    return _rename(tensors, table)


def _rename(tensors: Mapping[str, T], prefixes: Mapping[str, str]) -> dict[str, T]:
    renamed = {}
    for name, tensor in tensors.items():
        old = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        renamed[prefixes.get(old, "") + name.removeprefix(old)] = tensor
    return renamed
