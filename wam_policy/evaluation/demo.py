"""The demo: the embedded policy solves its tasks in a real simulator, a few episodes each, with videos."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wam_policy.errors import ResultsError
from wam_policy.evaluation.evaluate import EvalConfig, evaluate


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """A short evaluation of an embedded checkpoint."""

    model: Literal["fast", "light"] = "fast"
    """Which embedded checkpoint."""
    episodes: int = 5
    """Episodes per task."""
    output_dir: Path = Path("runs/demo")
    """Folder of the results; what an earlier demo left there is replaced."""


def demo(config: DemoConfig) -> None:
    """Run the demo."""
    if config.output_dir.exists() and not (config.output_dir / "run.json").is_file():
        raise ResultsError(
            f"{config.output_dir} exists and holds no demo; choose another --output-dir"
        )
    shutil.rmtree(config.output_dir, ignore_errors=True)
    evaluate(
        EvalConfig(
            checkpoint=f"embedded:metaworld-{config.model}-wam",
            episodes=config.episodes,
            output_dir=config.output_dir,
        )
    )
