"""Compares this package with tensors recorded from the reference implementations.

    python tests/reference.py FILE.safetensors [...]

Reads the configuration from the `.json` beside each file, prints one row per recorded tensor with its error
(max |a − b| / max(1, max |b|)) and exits non-zero if one is over its tolerance.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from recorded import fast_wam
from safetensors.torch import load_file
from torch import Tensor

TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 1e-4


class Row(NamedTuple):
    """One recorded tensor against ours."""

    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


def error(ours: Tensor, recorded: Tensor) -> float:
    """max |a − b| / max(1, max |b|); infinite where the shapes differ."""
    if ours.shape != recorded.shape:
        return float("inf")
    if recorded.dtype == torch.bool:
        return float((ours != recorded).sum())
    return float((ours.double() - recorded.double()).abs().max() / recorded.double().abs().max().clamp(min=1))


def compare(path: Path) -> list[Row]:
    """Compare everything recorded in one file; a recorded tensor that nothing here produces fails."""
    torch.manual_seed(0)
    recorded = load_file(path)
    ours = dict(fast_wam.tensors(recorded, json.loads(path.with_suffix(".json").read_text())))
    rows = []
    for name in sorted(recorded):
        given = name.startswith(("weights/", "in/")) or "/draw" in name or "/noise_" in name
        if given or name == "schedule/weight_t":
            continue
        tolerance = GRADIENT_TOLERANCE if "/grad/" in name else TOLERANCE
        rows.append(Row(name, error(ours[name].detach(), recorded[name]) if name in ours else float("nan"), tolerance))
    return rows


def main(paths: list[str]) -> int:
    if not paths:
        print(__doc__)
        return 2
    failed = 0
    for path in paths:
        rows = compare(Path(path))
        for row in rows:
            print(f"{'ok  ' if row.passed else 'OVER'} {row.error:9.2e} (≤ {row.tolerance:.0e})  {row.name}")
        over = sum(not row.passed for row in rows)
        print(f"{path}: {len(rows) - over} of {len(rows)} tensors within tolerance")
        failed += over + (not rows)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
