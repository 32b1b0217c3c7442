"""Normalisation of states and actions, and the statistics it needs; NumPy only.

See docs/method.md, "Data and normalisation". The rule "reference" follows `utils/normalizer.py`
of https://github.com/yuantianyuan01/FastWAM.
"""

# D components of the vector, N rows

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from wam_policy.errors import ConfigError

# Normalised values are clamped to ±LIMIT; the inverse does not clamp.
LIMIT = 5.0
# Components whose range is smaller than this are shifted to zero and not scaled.
CONSTANT_RANGE = 1e-4
EPSILON = 1e-8

Mode = Literal["min_max", "quantile", "z_score", "identity"]
Rule = Literal["reference", "lerobot"]
_REQUIRED: dict[str, tuple[str, str] | tuple[()]] = {
    "min_max": ("min", "max"),
    "quantile": ("q01", "q99"),
    "z_score": ("mean", "std"),
    "identity": (),
}


def required_statistics(mode: Mode) -> tuple[str, ...]:
    """Return the names of the statistics that a mode requires.

    Raises:
        ConfigError: There is no such mode.
    """
    if mode not in _REQUIRED:
        raise ConfigError(f"unknown normalisation {mode!r}; choose from {', '.join(_REQUIRED)}")
    return _REQUIRED[mode]


@dataclass(frozen=True, kw_only=True, slots=True)
class Normalization:
    """Normalisation of a vector: a mode and its statistics, one number per component.

    "min_max" and "quantile" map their two statistics to -1 and 1; "z_score" maps to zero mean and
    unit standard deviation; "identity" changes nothing. The rule "lerobot" differs from
    "reference" in three points: it does not clamp, it treats a component as constant only if its
    range is exactly zero, and it computes in float64.
    """

    mode: Mode
    statistics: dict[str, tuple[float, ...]]
    rule: Rule = "reference"

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            rules = ", ".join(get_args(Rule))
            raise ConfigError(f"unknown normalisation rule {self.rule!r}; choose from {rules}")
        required = required_statistics(self.mode)
        missing = [name for name in required if name not in self.statistics]
        if missing:
            raise ConfigError(
                f"normalisation {self.mode!r} needs the statistics {missing}, "
                f"got {sorted(self.statistics)}"
            )
        lengths = {name: len(values) for name, values in self.statistics.items()}
        if len(set(lengths.values())) > 1:
            raise ConfigError(f"all statistics of a vector must have its length, got {lengths}")
        for name, values in self.statistics.items():
            # Also beyond float32, in which the vectors are.
            with np.errstate(over="ignore"):
                is_finite = np.isfinite(np.asarray(values, np.float32)).all()
            if not is_finite:
                raise ConfigError(f"statistic {name!r} is not finite in float32: {values}")
        self._check_possible()

    def _check_possible(self) -> None:
        """Check that there are vectors with these statistics."""
        for low, high in (("min", "max"), ("q01", "q99")):
            if low in self.statistics and high in self.statistics:
                pairs = zip(self.statistics[low], self.statistics[high], strict=True)
                reversed_components = [i for i, (a, b) in enumerate(pairs) if a > b]
                if reversed_components:
                    raise ConfigError(
                        f"statistics: {low!r} is above {high!r} in the components "
                        f"{reversed_components}; compute them again"
                    )
        impossible = [i for i, x in enumerate(self.statistics.get("std", ())) if x <= 0]
        if impossible:
            raise ConfigError(
                f"statistics: 'std' is not positive in the components {impossible}; compute them "
                f"again, or write {EPSILON:g} for components that never change"
            )

    def check(self, what: str, dim: int) -> None:
        """Check that the statistics describe a vector of `dim` components.

        Args:
            what: Name of the vector, for the error message.
            dim: Number of components of the vector.

        Raises:
            ConfigError: A statistic has another length.
        """
        for name, values in self.statistics.items():
            if len(values) != dim:
                raise ConfigError(
                    f"{what}: expected {dim} numbers per statistic, got {len(values)} for {name!r}"
                )

    def affine(self) -> tuple[np.ndarray, np.ndarray]:
        """Return scale and offset of the affine map `x·scale + offset`.

        The arithmetic is float32 for the rule "reference". It is float64 for "lerobot", which
        scales constant components by 2e8: float32 would lose all digits of their offset.

        Returns:
            Scale and offset, both [D]; scalars 1 and 0 for "identity".
        """
        dtype: Any = np.float32 if self.rule == "reference" else np.float64
        if self.mode == "identity":
            return np.ones((), dtype), np.zeros((), dtype)

        first_name, second_name = required_statistics(self.mode)
        first = np.asarray(self.statistics[first_name], np.float32).astype(dtype)
        second = np.asarray(self.statistics[second_name], np.float32).astype(dtype)

        if self.mode == "z_score":
            mean = first
            divisor = second + EPSILON
            return 1 / divisor, -mean / divisor

        # The other modes map the interval [first, second] to [-1, 1].
        extent = second - first
        if self.rule == "lerobot":
            divisor = np.where(extent == 0, EPSILON, extent)
            scale = 2 / divisor
            return scale, -1 - scale * first

        # The inner `where` only keeps the division from overflowing in constant components.
        constant = extent < CONSTANT_RANGE
        divisor = np.where(constant, 1, extent)
        scale = np.where(constant, 1, 2 / divisor).astype(dtype)
        offset = np.where(constant, -first, -1 - scale * first)
        return scale, offset.astype(dtype)

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """Return the normalised vectors.

        Args:
            x: Raw vectors [..., D].

        Returns:
            Normalised vectors, float32 [..., D]; clamped to ±LIMIT by the rule "reference".
        """
        scale, offset = self.affine()
        normalized = x.astype(scale.dtype) * scale + offset
        if self.rule != "lerobot":
            normalized = np.clip(normalized, -LIMIT, LIMIT)
        return normalized.astype(np.float32)

    def denormalize(self, x: np.ndarray) -> np.ndarray:
        """Map normalised vectors [..., D] to raw vectors, float32 [..., D]."""
        scale, offset = self.affine()
        raw = (x.astype(scale.dtype) - offset) / scale
        return raw.astype(np.float32)


def compute_statistics(x: np.ndarray) -> dict[str, tuple[float, ...]]:
    """Compute the statistics of every mode.

    Args:
        x: Vectors [N, D].

    Returns:
        Statistic -> one number per component, rounded to float32. The deviation of a component
        that never changes is `EPSILON`.
    """
    x = np.asarray(x, np.float64)
    statistics = {
        "min": x.min(0),
        "max": x.max(0),
        "mean": x.mean(0),
        "std": np.maximum(x.std(0), EPSILON),
        "q01": np.quantile(x, 0.01, axis=0),
        "q99": np.quantile(x, 0.99, axis=0),
    }
    rounded = {name: values.astype(np.float32) for name, values in statistics.items()}
    return {name: tuple(values.tolist()) for name, values in rounded.items()}
