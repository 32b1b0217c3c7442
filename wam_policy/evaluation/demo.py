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
    out: Path = Path("runs/demo")
    """Folder of the results; what an earlier demo left there is replaced."""


def demo(config: DemoConfig) -> None:
    """Run the demo."""
    if config.out.exists() and not (config.out / "run.json").is_file():
        raise ResultsError(f"{config.out} exists and holds no demo; choose another --out")
    shutil.rmtree(config.out, ignore_errors=True)
    evaluate(EvalConfig(checkpoint=f"embedded:metaworld-{config.model}-wam", episodes=config.episodes, out=config.out))
