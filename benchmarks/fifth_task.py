"""The embedded Fast-WAM learns a fifth Meta-World task from 20 demonstrations: before, every weight trained, LoRA beside it.

    make fifth

"Before" is the embedded policy with nothing but an embedding of the new instruction. All three play the same episodes, on seeds
never trained on; one thread each. Started again, it goes on where it was; the results are in `docs/`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from papers_question import codec, wam

from wam_policy.checkpoints import embedded
from wam_policy.utils.environment import commit, versions
from wam_policy.utils.io import write_text

WAYS = {
    "before": (
        "nothing",
        ("--steps=1", "--optimizer.learning-rate=0", "--optimizer.weight-decay=0"),
    ),
    "full": ("every weight", ("--optimizer.learning-rate=3e-4",)),
    "lora": (
        "LoRA of rank 16 and the robot's own layers",
        ("--trainable=lora", "--optimizer.learning-rate=2e-3"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class FifthConfig:
    """The experiment."""

    task: str = "handle-press-v3"
    demonstrations: int = 20
    steps: int = 400
    """Updates, 32 windows each."""
    episodes: int = 50
    out: Path = Path("runs/fifth")
    docs: Path = Path("docs")


def learn(config: FifthConfig, way: str) -> dict[str, Any]:
    """Train one way, play the task, and return what came of it."""
    out, (title, options) = config.out / way, WAYS[way]
    if not (out / "checkpoint" / "config.json").is_file():
        reads = (
            f"--dataset={config.out / 'data'}",
            f"--codec={codec()}",
            f"--cache={config.out / 'latents'}",
            "--window-stride=1",
        )
        begins = (
            f"--pretrained-path={embedded('metaworld-fast-wam')}",
            "--keep-normalization",
            "--replan=4",
            "--num-threads=1",
        )
        wam(
            out / "log",
            "train",
            *reads,
            *begins,
            f"--output-dir={out}",
            "--optimizer.ema-decay=0.98",
            f"--steps={config.steps}",
            *options,
        )
    plays = (
        f"--checkpoint={out / 'checkpoint'}",
        f"--output-dir={out / 'eval'}",
        f"--episodes={config.episodes}",
        "--no-video",
    )
    wam(out / "log", "eval", *plays, "--num-envs=1", "--tasks", config.task)
    found = json.loads((out / "eval" / "summary.json").read_text())["tasks"][config.task]
    seconds = json.loads((out / "curve.jsonl").read_text().splitlines()[-1])["seconds"]
    return {"trained": title, **found, "minutes": seconds / 60 if way != "before" else 0.0}


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = ["| trained | success | 95 % | minutes of training |", "|---|---|---|---|"]
    for row in rows:
        low, high = row["interval"]
        lines.append(
            f"| {row['trained']} | **{row['success']:.0%}** | {low:.0%} … {high:.0%} | {row['minutes']:.0f} |"
        )
    return "\n".join(lines)


def main(config: FifthConfig) -> None:
    """Run what is missing, then write the table."""
    data = config.out / "data"
    if not (data / "meta" / "info.json").is_file():
        wanted = ("--tasks", config.task, str(config.demonstrations))
        wam(
            config.out / "record.log",
            "record",
            f"--output-dir={data}",
            "--seed=4000000",
            "--perturbation-rate=0.03",
            *wanted,
        )
    rows = {way: learn(config, way) for way in WAYS}
    facts = {
        "commit": commit(),
        "versions": versions(),
        "cores": os.cpu_count(),
        "config": asdict(config),
    }
    config.docs.mkdir(exist_ok=True)
    write_text(
        config.docs / "fifth_task.json",
        json.dumps({"rows": rows, **facts}, indent=2, default=str) + "\n",
    )
    print(table(rows.values()))


if __name__ == "__main__":
    main(tyro.cli(FifthConfig, description=__doc__))
