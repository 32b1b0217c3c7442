"""Compares this package with tensors recorded from the reference implementations.

    python tests/reference.py FILE.safetensors [...]

The name of a file tells its content: `fastwam_*`, `lightwam_*`, `init_*` and `bf16_*` (which need
the `fastwam_*` and, where `bf16_*` has Light-WAM tensors, the `lightwam_*` of the same name beside
them), `vae_*`, `text_*`, `io_*` (which needs its two statistics files). The configuration is in the
`.json` of the same name.

Prints one row per recorded tensor with its error (max |a − b| / max(1, max |b|)), and exits with a
status other than zero if an error exceeds its tolerance.
"""

import json
import sys
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import torch
from recorded import bf16, fast_wam, init, io, light_wam, text, vae
from safetensors.torch import load_file
from torch import Tensor

TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4
PIXEL_TOLERANCE = 1e-4
IO_TOLERANCE = 1e-6
# What the reference was given.
GIVEN = (
    "weights/",
    "in/",
    "vae38/weights/",
    "vae16/weights/",
    "schedule/weight_t",
)


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
    return float(
        (ours.double() - recorded.double()).abs().max() / recorded.double().abs().max().clamp(min=1)
    )


def read(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the configuration in the file of this kind that stands beside `path`."""
    beside = path.with_name(kind + "_" + path.name.split("_", 1)[-1])
    return load_file(beside), json.loads(beside.with_suffix(".json").read_text())


def values(path: Path, recorded: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our value of everything recorded in a file."""
    match path.name.split("_")[0]:
        case "lightwam":
            return dict(
                light_wam.tensors(recorded, json.loads(path.with_suffix(".json").read_text()))
            )
        case "init":
            return dict(init.tensors(*read(path, "fastwam")))
        case "bf16":
            light = read(path, "lightwam") if bf16.LIGHT in recorded else None
            return dict(bf16.tensors(recorded, read(path, "fastwam"), light))
        case "vae":
            return dict(vae.tensors(*read(path, "vae")))
        case "text":
            return dict(text.tensors(*read(path, "text")))
        case "io":
            return dict(io.tensors(recorded, path))
        case _:
            return dict(
                fast_wam.tensors(recorded, json.loads(path.with_suffix(".json").read_text()))
            )


def tolerances(path: Path, recorded: dict[str, Tensor]) -> dict[str, float]:
    """How far each recorded tensor may be from ours."""
    if path.name.startswith("bf16_"):
        exact, _ = read(path, "fastwam")
        limits = {
            name: bf16.tolerance(x, exact.get(name) if "/infer/" in name else None)
            for name, x in recorded.items()
        }
        if bf16.LIGHT in recorded:
            limits[bf16.LIGHT] = bf16.light_tolerance(recorded[bf16.LIGHT], read(path, "lightwam"))
        return limits
    if path.name.startswith("io_"):
        return dict.fromkeys(recorded, IO_TOLERANCE)
    kinds = {"/grad/": GRADIENT_TOLERANCE, "/reconstruction": PIXEL_TOLERANCE}
    return {
        name: next((t for part, t in kinds.items() if part in name), TOLERANCE) for name in recorded
    }


def compare(path: Path) -> list[Row]:
    """Compare all tensors recorded in one file; one that is not produced here fails."""
    torch.manual_seed(0)
    recorded = load_file(path)
    # The decoder clamps, the recording does not.
    wanted = {
        name: x.clamp(-1, 1) if name.endswith("/reconstruction") else x
        for name, x in recorded.items()
        if not name.startswith(GIVEN)
        and not any(part in name for part in ("/draw", "/noise_", "/obs/", "/model/action"))
    }
    if not wanted:
        return []
    ours, limits = values(path, recorded), tolerances(path, wanted)
    return [
        Row(name, error(ours[name].detach(), x) if name in ours else float("nan"), limits[name])
        for name, x in sorted(wanted.items())
    ]


def main(paths: list[str]) -> int:
    if not paths:
        print(__doc__)
        return 2
    failed = 0
    for path in paths:
        try:
            rows = compare(Path(path))
        except Exception:  # the other files are still compared
            traceback.print_exc()
            print(f"{path}: could not be compared")
            failed += 1
            continue
        for row in rows:
            verdict = "ok  " if row.passed else "OVER"
            print(f"{verdict} {row.error:9.2e} (≤ {row.tolerance:.0e})  {row.name}")
        over = sum(not row.passed for row in rows)
        print(f"{path}: {len(rows) - over} of {len(rows)} tensors within tolerance")
        failed += over + (not rows)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
