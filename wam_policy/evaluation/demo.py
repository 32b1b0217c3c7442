"""`wam demo`: a short evaluation of an embedded policy in a real simulator, with videos."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from wam_policy.errors import ResultsError
from wam_policy.evaluation import results
from wam_policy.evaluation.config import METAWORLD_TASKS, EvalConfig
from wam_policy.evaluation.evaluate import evaluate
from wam_policy.utils.io import explained_write_errors, locked, write_text

# File that marks the folder of a demo.
MARKER = "demo.json"

# What the embedded LIBERO policies were trained on: five tasks, seen by small cameras.
LIBERO_TASKS = tuple(f"libero_object/{index}" for index in (0, 4, 5, 7, 9))
LIBERO_ENV_KWARGS = {"size": "64", "shadows": "False"}


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """A short evaluation of an embedded checkpoint."""

    model: Literal["fast", "light"] = "fast"
    """Family of the embedded checkpoint: Fast-WAM or Light-WAM."""
    env: Literal["metaworld", "libero"] = "metaworld"
    """Simulator: four tasks of Meta-World, or five of LIBERO (extra `libero`)."""
    episodes: int = 5
    """Episodes per task."""
    output_dir: Path = Path("runs/demo")
    """Folder for the results; the results of an earlier demo are replaced."""


def demo(config: DemoConfig) -> None:
    """Run the demo.

    Raises:
        ResultsError: The folder holds something else than a demo.
        CheckpointError: Another demo uses the folder, or it cannot be written.
    """
    # Only the results of a demo are removed.
    folder = config.output_dir
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).is_file():
            raise ResultsError(
                f"{folder} holds something else than a demo (it has no {MARKER}); "
                f"remove it yourself, or choose another --output-dir"
            )
        with locked(folder):
            _remove_results(folder)
    with explained_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / MARKER, "{}\n")

    options = EvalConfig(
        checkpoint=f"embedded:{config.env}-{config.model}-wam",
        episodes=config.episodes,
        output_dir=config.output_dir,
    )
    if config.env == "libero":
        options = replace(
            options, protocol="fastwam", tasks=LIBERO_TASKS, env_kwargs=LIBERO_ENV_KWARGS
        )
    evaluate(options)


def _remove_results(folder: Path) -> None:
    """Remove the files that a demo writes; others stay."""
    for task in (*METAWORLD_TASKS, *LIBERO_TASKS):
        results.video_path(folder, task).unlink(missing_ok=True)
    for name in (results.RUN, results.EPISODES, results.FAILURES, results.SUMMARY):
        (folder / name).unlink(missing_ok=True)
    for frame in (folder / results.FAILED).glob("*.png"):
        frame.unlink()
