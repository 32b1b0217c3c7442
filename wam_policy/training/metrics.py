"""What a run tells of itself while it runs: rows of numbers in `curve.jsonl`, on the terminal, and in whatever tracks them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from wam_policy.data.sampler import DeterministicSampler
from wam_policy.errors import MissingExtraError, TrainingError
from wam_policy.training.checkpoint import TrainState, latest_checkpoint
from wam_policy.training.config import RunConfig, Tracker
from wam_policy.utils.io import write_text

CURVE = "curve.jsonl"
STEPS = "steps"  # how many a sum holds
ROUNDED = ("seconds", "samples_per_s")
COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)
Sink = Callable[[Mapping[str, Any]], None]
"""Takes a row: a number for each name, "step" among them."""


class MetricsLogger:
    """The losses of a run: summed on the device, written as a row now and then, shown while it runs."""

    def __init__(
        self,
        config: RunConfig,
        state: TrainState,
        order: DeterministicSampler,
        names: Sequence[str],
    ) -> None:
        """Begin, or go on after the rows that a stopped run wrote up to its checkpoint; `names` are the examples'."""
        self.config, self.state, self.order, self.names, self.path = (
            config,
            state,
            order,
            names,
            config.output_dir / CURVE,
        )
        rows = self.path.read_text().splitlines(keepends=True) if self.path.is_file() else []
        kept = [row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= state.step]
        self.first = state.processes.is_main
        if self.first:
            write_text(self.path, "".join(kept))
        self.before = max((json.loads(row).get("seconds", 0.0) for row in kept), default=0.0)
        self.began, self.start = time.monotonic(), state.step
        self.progress = Progress(*COLUMNS, disable=not self.first)
        self.sums: dict[str, Tensor] = {
            name: torch.tensor(value) for name, value in state.sums.items()
        }
        self.sinks = [make_sink(kind, config) for kind in config.report_to if self.first]
        self.first_bad: Tensor | None = None

    def holds(self, name: str) -> bool:
        """Whether there is a row of the newest checkpoint's step with numbers of a name that begins so."""
        rows = map(json.loads, self.path.read_text().splitlines())
        return any(
            row["step"] == self.state.step and any(key.startswith(name) for key in row)
            for row in rows
        )

    def __enter__(self) -> MetricsLogger:
        self.progress.start()
        self.bar = self.progress.add_task(
            "training", total=self.config.steps, completed=self.state.step
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def add_step(self, numbers: dict[str, Tensor]) -> None:
        """Add a step's numbers; nothing is waited for."""
        counted = numbers | {STEPS: torch.ones(())}
        self.sums = {
            name: self.sums[name] + x if name in self.sums else x for name, x in counted.items()
        }
        good = torch.stack([x.isfinite() for x in numbers.values()]).all()
        bad = torch.where(good, torch.inf, float(self.state.step))
        self.first_bad = bad if self.first_bad is None else torch.minimum(self.first_bad, bad)

    def check(self) -> None:
        """Note the sums in the state, to be saved with it.

        Raises:
            TrainingError: a loss wasn't finite; its step and the examples are named.
        """
        self.state.sums = {name: float(x) for name, x in self.sums.items()}
        if self.first_bad is not None and self.first_bad.isfinite():
            step = int(self.first_bad)
            index = self.order.batch(step - 1).tolist()
            raise TrainingError(
                f"a loss or gradient isn't finite in step {step}: "
                f"{', '.join(self.names[i] for i in index)}; look at these, or lower the learning rate; the last checkpoint, "
                f"before it, is {latest_checkpoint(self.config.output_dir)}"
            )

    def log_row(self) -> None:
        """Write a row of averages since the last one, and begin anew."""
        self.check()
        step, config = self.state.step, self.config
        count = self.state.sums.pop(STEPS)
        row: dict[str, Any] = {"step": step} | {
            name: total / count for name, total in self.state.sums.items()
        }
        passed = time.monotonic() - self.began
        row |= {
            "samples_per_s": (step - self.start) * config.batch_size / passed,
            "seconds": self.before + passed,
        }
        self.write(row)
        self.sums, self.state.sums = {}, {}
        text = f"video {row['video']:.3f} action {row['action']:.3f}, {row['samples_per_s']:.1f} samples/s"
        self.progress.update(self.bar, completed=step, description=text)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row to the file, and hand it to the trackers; of several processes the first does."""
        if not self.first:
            return
        with self.path.open("a") as file:
            file.write(
                json.dumps(
                    {name: float(f"{x:.6g}") if name in ROUNDED else x for name, x in row.items()}
                )
                + "\n"
            )
        for take in self.sinks:
            take(row)


def make_sink(kind: Tracker, config: RunConfig) -> Sink:
    """What hands rows to a tracker.

    Raises:
        MissingExtraError: it isn't installed.
    """
    if kind == "tensorboard":
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError("tensorboard", "track") from error
        writer = SummaryWriter(str(config.output_dir / "tensorboard"))

        def write(row: Mapping[str, Any]) -> None:
            for name, value in row.items():
                if name != "step":
                    writer.add_scalar(name, value, row["step"])
            writer.flush()

        return write
    try:
        tracker = __import__(kind)
    except ImportError as error:
        raise MissingExtraError(kind, "track") from error
    tracker.init(project="wam-policy", name=config.output_dir.name)
    return lambda row: tracker.log(
        {name: value for name, value in row.items() if name != "step"}, step=row["step"]
    )
