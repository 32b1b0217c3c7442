"""Statistics in the pre- and postprocessor of LeRobot's checkpoints.

`src/lerobot/processor/` in https://github.com/huggingface/lerobot writes these files.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor

from wam_policy.errors import CheckpointError
from wam_policy.hub import weights
from wam_policy.normalize import Mode, Normalization, required_statistics
from wam_policy.utils import documents

CURE = "download it again"

# LeRobot's names of the normalisation modes, and this package's.
MODES: dict[str, Mode] = {
    "IDENTITY": "identity",
    "MIN_MAX": "min_max",
    "MEAN_STD": "z_score",
    "QUANTILES": "quantile",
}


class ProcessorStatistics:
    """Normalisation modes by kind of feature, and statistics by feature, of a processor."""

    def __init__(self, folder: Path, pipeline: str, step: str) -> None:
        """Read the files of a processor.

        Args:
            folder: Folder of the checkpoint.
            pipeline: "policy_preprocessor" or "policy_postprocessor".
            step: Name of the step that normalises.

        Raises:
            CheckpointError: The file or the step is missing.
        """
        self.path = folder / f"{pipeline}.json"
        with explained(self.path):
            steps = read_json(self.path).get("steps", [])
            self.steps = {entry.get("registry_name"): entry.get("config") or {} for entry in steps}
            state_files = {entry.get("registry_name"): entry.get("state_file") for entry in steps}
            state_file = state_files.get(step)
            has_norm_map = "norm_map" in self.steps.get(step, {})
        if not isinstance(state_file, str) or not has_norm_map:
            raise CheckpointError(
                f"{self.path} holds no statistics (a step {step!r} with a `state_file`): without "
                f"them actions mean nothing; copy the checkpoint's processor files too"
            )
        self.modes: Mapping[str, str] = self.steps[step]["norm_map"]
        self.tensors: dict[str, Tensor] = weights.read_weights_file(folder / Path(state_file).name)

    def mode(self, kind: str) -> Mode:
        """Return the normalisation mode of a kind of feature.

        Args:
            kind: "VISUAL", "STATE" or "ACTION".

        Raises:
            CheckpointError: The mode is not supported.
        """
        name = self.modes.get(kind, "IDENTITY")
        if name not in MODES:
            raise CheckpointError(
                f"{self.path}: unknown normalisation {name!r} of {kind}; "
                f"expected one of {', '.join(MODES)}"
            )
        return MODES[name]

    def normalization(self, kind: str, feature: str) -> Normalization:
        """Return the normalisation of a feature.

        Args:
            kind: Kind of the feature.
            feature: Name of the feature.

        Raises:
            CheckpointError: Statistics are missing. LeRobot would not normalise the feature then.
        """
        mode = self.mode(kind)
        names = required_statistics(mode)
        missing = [name for name in names if f"{feature}.{name}" not in self.tensors]
        if missing:
            raise CheckpointError(
                f"{self.path}: {feature} is normalised by {mode}, "
                f"but its {' and '.join(missing)} is missing"
            )

        statistics = {}
        for name in names:
            values = self.tensors[f"{feature}.{name}"].flatten().tolist()
            statistics[name] = tuple(map(float, values))
        return Normalization(mode=mode, statistics=statistics, rule="lerobot")


def explained(path: Path) -> AbstractContextManager[None]:
    """Report entries of a file that have another form as errors of the checkpoint."""
    return documents.explained(path, CheckpointError, CURE)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object."""
    return documents.read_json_object(path, CheckpointError, CURE)
