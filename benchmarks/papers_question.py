"""Does learning to predict the video help the policy, and does it need the video at run time? The papers' question, small.

    make question

Every run begins from the same video expert, which was trained on videos of six other Meta-World tasks and never on an action
(what Wan is to the papers), and then learns the four tasks from the same demonstrations, windows and updates. Runs and
evaluations have one thread each, `workers` go at a time; the speeds in the table are measured after all of them, one by one, on
a machine with nothing else to do. Started again, it goes on where it was; the results are in `docs/`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console

from wam_policy import WAMPolicy
from wam_policy.checkpoints import embedded
from wam_policy.evaluation.evaluate import METAWORLD_TASKS
from wam_policy.evaluation.results import wilson_interval
from wam_policy.observation import IMAGE, INSTRUCTION, STATE
from wam_policy.utils.environment import commit, versions
from wam_policy.utils.io import write_text

OTHERS = (
    "door-open-v3",
    "plate-slide-v3",
    "faucet-open-v3",
    "coffee-button-v3",
    "handle-press-v3",
    "dial-turn-v3",
)
BATCH = 32
RECIPE = (
    "--optimizer.learning-rate=1e-3",
    "--optimizer.warmup-steps=50",
    "--optimizer.ema-decay=0.99",
    "--replan=4",
    "--num-threads=1",
)


@dataclass(frozen=True)
class Condition:
    """One way of training, and how many seeds it gets."""

    title: str
    command: str
    options: tuple[str, ...]
    seeds: int


FAST = ("--pretrained-part=video",)
CONDITIONS = {
    "fast": Condition("Fast-WAM", "train", FAST, 3),
    "no-video": Condition(
        "Fast-WAM without video co-training", "train", (*FAST, "--loss.lambda-video=0"), 3
    ),
    "joint": Condition(
        "Joint: actions and video denoised together", "train", (*FAST, "--variant=joint"), 1
    ),
    "idm": Condition(
        "IDM: first the video, then the actions", "train", (*FAST, "--variant=idm"), 1
    ),
    "light": Condition("Light-WAM", "train-light", (), 3),
}


@dataclass(frozen=True, kw_only=True)
class QuestionConfig:
    """The experiment."""

    dataset: Path = Path("runs/checkpoint/shoved")
    """Demonstrations of the four tasks: `make question` records them."""
    output_dir: Path = Path("runs/question")
    docs: Path = Path("docs")
    demonstrations: int = 30
    """Of each of the six other tasks."""
    steps: int = 1000
    """Updates of every run, and of the video expert before them; 32 windows each."""
    episodes: int = 25
    """Per task and run, on seeds never trained on."""
    workers: int = 2
    """Runs at a time."""


def wam(log: Path, command: str, *options: str) -> None:
    """Run a subcommand with one thread; what it prints goes to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("a") as file:
        full = [sys.executable, "-m", "wam_policy.cli", command, *options]
        subprocess.run(full, check=True, stdout=file, stderr=subprocess.STDOUT, env=environment)


def prepare(config: QuestionConfig) -> None:
    """Record the other tasks, encode both datasets, train the video expert."""
    other, log = config.output_dir / "other", config.output_dir / "prepare.log"
    if (config.output_dir / "video" / "checkpoint" / "config.json").is_file():
        return
    if not (other / "meta" / "info.json").is_file():
        wanted = [word for task in OTHERS for word in (task, str(config.demonstrations))]
        wam(
            log,
            "record",
            f"--output-dir={other}",
            "--seed=3000000",
            "--perturbation-rate=0.03",
            "--tasks",
            *wanted,
        )
    for dataset, cache in ((other, "latents-other"), (config.dataset, "latents")):
        wam(
            log,
            "cache",
            f"--dataset={dataset}",
            f"--codec={codec()}",
            f"--cache={config.output_dir / cache}",
            "--num-threads=1",
        )
    options = (
        *data(other, config.output_dir / "latents-other"),
        f"--steps={config.steps}",
        f"--output-dir={config.output_dir / 'video'}",
    )
    wam(log, "train", *options, *RECIPE, "--trainable=video", "--loss.lambda-action=0")


def codec() -> Path:
    """The embedded policy's video codec."""
    return embedded("metaworld-fast-wam") / "vae"


def data(dataset: Path, cache: Path) -> list[str]:
    """Options that say what a run reads."""
    return [f"--dataset={dataset}", f"--codec={codec()}", f"--cache={cache}", "--window-stride=2"]


def training(config: QuestionConfig, name: str, out: Path, *more: str) -> tuple[str, ...]:
    """The command that trains one condition."""
    condition = CONDITIONS[name]
    begin = f"--pretrained-path={config.output_dir / 'video' / 'checkpoint'}"
    reads = data(config.dataset, config.output_dir / "latents")
    return (
        condition.command,
        *reads,
        begin,
        *condition.options,
        *RECIPE,
        f"--output-dir={out}",
        *more,
    )


def run(config: QuestionConfig, name: str, seed: int) -> None:
    """Train one condition with one seed, and play what came of it."""
    out = config.output_dir / f"{name}-{seed}"
    began = time.monotonic()
    if not (out / "checkpoint" / "config.json").is_file():
        wam(out / "log", *training(config, name, out, f"--steps={config.steps}", f"--seed={seed}"))
    options = (
        f"--checkpoint={out / 'checkpoint'}",
        f"--output-dir={out / 'eval'}",
        f"--episodes={config.episodes}",
        "--num-envs=1",
    )
    wam(out / "log", "eval", *options, "--no-video", "--tasks", *METAWORLD_TASKS)
    print(f"{name}, seed {seed}: {json.loads((out / 'eval' / 'summary.json').read_text())['mean_success']:.0%} "
          f"({(time.monotonic() - began) / 60:.0f} minutes)", flush=True)  # fmt: skip


def rate(config: QuestionConfig, name: str) -> float:
    """Samples per second of training, compiling left out."""
    out = config.output_dir / "rate" / name
    if not (out / "checkpoint" / "config.json").is_file():
        wam(
            out / "log",
            *training(config, name, out, "--steps=60", "--logging-steps=10", "--seed=0"),
        )
    rows = [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]
    times = [row["seconds"] for row in rows]
    return 10 * BATCH / statistics.median(np.diff(times[1:]).tolist())


def latency(checkpoint: Path, calls: int = 40) -> float:
    """Milliseconds of a chunk for one observation, median; uncompiled, with the threads PyTorch takes."""
    policy = WAMPolicy.from_pretrained(checkpoint)
    rng, cameras = np.random.default_rng(0), policy.config.cameras
    assert policy.config.state is not None
    seen: dict[str, Any] = {
        IMAGE + name: rng.integers(0, 256, (cameras.height, cameras.width, 3), np.uint8)
        for name in cameras.names
    }
    seen |= {
        STATE: rng.standard_normal(len(policy.config.state.names)).astype(np.float32),
        INSTRUCTION: next(iter(policy.prompts.table)),
    }
    times = []
    for _ in range(calls):
        began = time.perf_counter()
        policy.predict_chunk(seen)
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times[5:])


def row(config: QuestionConfig, name: str) -> dict[str, Any]:
    """What came of one condition: its seeds together and apart, and its speeds."""
    seeds = range(CONDITIONS[name].seeds)
    found = [
        json.loads((config.output_dir / f"{name}-{seed}" / "eval" / "summary.json").read_text())
        for seed in seeds
    ]
    rates = {task: [one["tasks"][task]["success"] for one in found] for task in METAWORLD_TASKS}
    wins = round(config.episodes * sum(map(sum, rates.values())))
    episodes = config.episodes * len(METAWORLD_TASKS) * len(seeds)
    samples = rate(config, name)
    return {
        "title": CONDITIONS[name].title,
        "success": wins / episodes,
        "interval": wilson_interval(wins, episodes),
        "episodes": episodes,
        "seeds": [one["mean_success"] for one in found],
        "tasks": {task: statistics.mean(rate) for task, rate in rates.items()},
        "samples_per_s": samples,
        "training_minutes": config.steps * BATCH / samples / 60,
        "latency_ms": latency(config.output_dir / f"{name}-0" / "checkpoint"),
    }


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    short = [task.removesuffix("-v3") for task in METAWORLD_TASKS]
    head = ["trained as", *short, "mean", "95 %", "each seed", "a chunk", "training", "a run"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for one in rows:
        low, high = one["interval"]
        cells = [
            one["title"],
            *(f"{one['tasks'][task]:.0%}" for task in METAWORLD_TASKS),
            f"**{one['success']:.1%}**",
        ]
        cells += [
            f"{low:.0%} … {high:.0%}",
            ", ".join(f"{seed:.0%}" for seed in one["seeds"]),
            f"{one['latency_ms']:.0f} ms",
        ]
        cells += [f"{one['samples_per_s']:.0f} samples/s", f"{one['training_minutes']:.0f} min"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Success with its interval and every seed, beside what a chunk costs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    success, cost = figure.subplots(1, 2, sharey=True)
    for y, one in enumerate(rows):
        low, high = one["interval"]
        error = [[100 * (one["success"] - low)], [100 * (high - one["success"])]]
        success.errorbar(100 * one["success"], y, xerr=error, fmt="o", color="C0", capsize=4)
        success.plot(
            [100 * seed for seed in one["seeds"]], [y + 0.22] * len(one["seeds"]), "|", color="C1"
        )
        cost.barh(y, one["latency_ms"], color="C0", height=0.5)
    success.set(xlabel="success, % (point: 95 % interval; strokes: seeds)", xlim=(0, 100))
    success.set_yticks(range(len(rows)), [one["title"].split(":")[0] for one in rows])
    success.invert_yaxis()
    cost.set(xlabel="a chunk, ms")
    for axis in (success, cost):
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)


def main(config: QuestionConfig) -> None:
    """Run what is missing, then write the table and its plot."""
    prepare(config)
    order = sorted(
        ((name, seed) for name, one in CONDITIONS.items() for seed in range(one.seeds)),
        key=lambda pair: pair[1],
    )
    with ThreadPoolExecutor(config.workers) as pool:
        for done in [pool.submit(run, config, name, seed) for name, seed in order]:
            done.result()
    rows = {name: row(config, name) for name in CONDITIONS}
    facts = {
        "commit": commit(),
        "versions": versions(),
        "cores": os.cpu_count(),
        "config": asdict(config),
    }
    config.docs.mkdir(exist_ok=True)
    write_text(
        config.docs / "papers_question.json",
        json.dumps({"rows": rows, **facts}, indent=2, default=str) + "\n",
    )
    write_text(config.docs / "papers_question_table.md", table(rows.values()) + "\n")
    plot(list(rows.values()), config.docs / "papers_question.png")
    Console().print(table(rows.values()))


if __name__ == "__main__":
    main(tyro.cli(QuestionConfig, description=__doc__))
