"""Statistics of states and actions and the two mirror-image transforms they define; numpy only.

Source: spec/fastwam.md section 5.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from wam_policy.errors import ConfigError

LIMIT = 5.0  # normalised values are clamped to ±LIMIT; the inverse is not
CONSTANT_RANGE = 1e-4  # numbers that vary less than this are shifted, not scaled
EPSILON = 1e-8

Mode = Literal["min_max", "quantile", "z_score", "identity"]
Rule = Literal["reference", "lerobot"]
_NEEDS: dict[str, tuple[str, str] | tuple[()]] = {
    "min_max": ("min", "max"),
    "quantile": ("q01", "q99"),
    "z_score": ("mean", "std"),
    "identity": (),
}


def required_statistics(mode: Mode) -> tuple[str, ...]:
    """The statistics a mode needs.

    Raises:
        ConfigError: there is no such mode.
    """
    if mode not in _NEEDS:
        raise ConfigError(f"unknown normalisation {mode!r}; there are {', '.join(_NEEDS)}")
    return _NEEDS[mode]


@dataclass(frozen=True, kw_only=True, slots=True)
class Normalization:
    """How one vector is normalised: a mode and the statistics that it needs, a number per entry.

    `min_max` and `quantile` map the two statistics to -1 and 1; `z_score` maps to zero mean and unit deviation. LeRobot's rule
    differs from the reference's: nothing is clamped, and a number is constant only if it never varied at all.
    """

    mode: Mode
    statistics: dict[str, tuple[float, ...]]
    rule: Rule = "reference"

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise ConfigError(
                f"unknown normalisation rule {self.rule!r}; there are {get_args(Rule)}"
            )
        missing = [name for name in required_statistics(self.mode) if name not in self.statistics]
        if missing:
            raise ConfigError(
                f"normalisation {self.mode!r} needs the statistics {missing}, got {sorted(self.statistics)}"
            )
        if len({len(values) for values in self.statistics.values()}) > 1:
            raise ConfigError("statistics of one vector must all have its length")
        for name, values in self.statistics.items():
            if not np.isfinite(values).all():
                raise ConfigError(f"statistic {name!r} isn't finite: {values}")

    def check(self, what: str, dim: int) -> None:
        """Refuse statistics that are not `dim` long."""
        for name, values in self.statistics.items():
            if len(values) != dim:
                raise ConfigError(
                    f"{what}: statistic {name!r} has {len(values)} numbers, the vector has {dim}"
                )

    def affine(self) -> tuple[np.ndarray, np.ndarray]:
        """Scale and offset of `x·scale + offset`; both are 1 and 0 for "identity".

        float32 by the reference's rule; float64 by LeRobot's, whose constants are scaled by 2e8.
        """
        dtype: Any = np.float32 if self.rule == "reference" else np.float64
        if self.mode == "identity":
            return np.ones((), dtype), np.zeros((), dtype)
        first, second = (
            np.asarray(self.statistics[name], np.float32).astype(dtype)
            for name in _NEEDS[self.mode]
        )
        if self.mode == "z_score":
            return 1 / (second + EPSILON), -first / (second + EPSILON)
        extent = second - first
        if self.rule == "lerobot":
            scale = 2 / np.where(extent == 0, EPSILON, extent)
            return scale, -1 - scale * first
        constant = extent < CONSTANT_RANGE
        scale = np.where(constant, 1, 2 / np.where(constant, 1, extent)).astype(dtype)
        return scale, np.where(constant, -first, -1 - scale * first).astype(dtype)

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """Raw [..., D] -> normalised float32 [..., D], by the reference's rule clamped to ±5."""
        scale, offset = self.affine()
        normalized = x.astype(scale.dtype) * scale + offset
        return (
            normalized if self.rule == "lerobot" else np.clip(normalized, -LIMIT, LIMIT)
        ).astype(np.float32)

    def denormalize(self, x: np.ndarray) -> np.ndarray:
        """Normalised [..., D] -> raw float32 [..., D]."""
        scale, offset = self.affine()
        return ((x.astype(scale.dtype) - offset) / scale).astype(np.float32)


def compute_statistics(x: np.ndarray) -> dict[str, tuple[float, ...]]:
    """All the statistics a mode may need, of rows [N, D]."""
    x = np.asarray(x, np.float64)
    values = {
        "min": x.min(0),
        "max": x.max(0),
        "mean": x.mean(0),
        "std": x.std(0),
        "q01": np.quantile(x, 0.01, axis=0),
        "q99": np.quantile(x, 0.99, axis=0),
    }
    return {name: tuple(float(np.float32(v)) for v in row) for name, row in values.items()}
