"""The metrics of a run while it trains: rows in `curve.jsonl`, a progress bar, and trackers."""

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
from wam_policy.training.report import read_rows
from wam_policy.utils.io import write_text

CURVE = "curve.jsonl"  # in the folder of a run
STEPS = "steps"  # key of the number of steps that the sums are over
ROUNDED = ("seconds", "samples_per_s")  # numbers written with six digits

# Takes a row: a number for each name, "step" among them.
Sink = Callable[[Mapping[str, Any]], None]


class MetricsLogger:
    """The losses of a run: summed on the device, and written as a row of means now and then."""

    def __init__(
        self,
        config: RunConfig,
        state: TrainState,
        sampler: DeterministicSampler,
        names: Sequence[str],
    ) -> None:
        """Start a curve, or continue the one of a stopped run after its checkpoint's step.

        Args:
            config: Resolved options of the run.
            state: State of the run; its `sums` are updated.
            sampler: The windows of each step.
            names: Where each window comes from, for messages.
        """
        self.config = config
        self.state = state
        self.sampler = sampler
        self.names = names
        self.path = config.output_dir / CURVE
        self.is_main = state.processes.is_main
        previous_rows = self._drop_later_rows()

        # Time goes on from the last row of the stopped run.
        seconds = [row.get("seconds", 0.0) for row in previous_rows]
        self.previous_seconds = max(seconds, default=0.0)
        self.start_time = time.monotonic()
        self.start_step = state.step

        self.progress = _progress_bar(self.is_main)
        self.sums: dict[str, Tensor] = {}
        for name, value in state.sums.items():
            self.sums[name] = torch.tensor(value, dtype=torch.float32, device="cpu")
        self.sinks: list[Sink] = []
        if self.is_main:
            self.sinks = [make_sink(kind, config) for kind in config.report_to]
        self.first_bad: Tensor | None = None  # first step with a loss that is not finite

    def _drop_later_rows(self) -> list[dict[str, Any]]:
        """Remove the rows after the step of the state; return the remaining ones."""
        lines = []
        if self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)

        remaining = []
        rows = []
        for line in lines:
            # A killed run may have left half a line.
            if not line.endswith("\n"):
                continue
            row = json.loads(line)
            if row["step"] <= self.state.step:
                remaining.append(line)
                rows.append(row)
        if self.is_main:
            write_text(self.path, "".join(remaining))
        return rows

    def has_metric(self, prefix: str) -> bool:
        """Return whether a row of the current step has a number whose name starts so."""
        for row in read_rows(self.path):
            if row["step"] == self.state.step and any(name.startswith(prefix) for name in row):
                return True
        return False

    def __enter__(self) -> MetricsLogger:
        self.progress.start()
        self.bar = self.progress.add_task(
            "training", total=self.config.steps, completed=self.state.step
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def add_step(self, numbers: dict[str, Tensor]) -> None:
        """Add the scalars of a step to the sums, without waiting for the device."""
        # Tensors on the device: nothing here reads a value.
        sums = {}
        one = torch.ones((), dtype=torch.float32, device="cpu")
        for name, x in (numbers | {STEPS: one}).items():
            sums[name] = self.sums[name] + x if name in self.sums else x
        self.sums = sums

        # Remember only the first step that is not finite; the ones after it follow from it.
        finite = torch.stack([x.isfinite() for x in numbers.values()]).all()
        bad_step = torch.where(finite, torch.inf, float(self.state.step))
        if self.first_bad is not None:
            bad_step = torch.minimum(self.first_bad, bad_step)
        self.first_bad = bad_step

    def check(self) -> None:
        """Store the sums in the state, so that they are saved with it.

        Raises:
            TrainingError: A loss was not finite; the message names its step and windows.
        """
        self.state.sums = {name: float(x) for name, x in self.sums.items()}
        if self.first_bad is None or not self.first_bad.isfinite():
            return

        # Step n, counted from 1, is made of batch n - 1.
        step = int(self.first_bad)
        index = self.sampler.batch(step - 1).tolist()
        windows = ", ".join(self.names[i] for i in index)
        raise TrainingError(
            f"a loss or gradient is not finite in step {step}: {windows}; inspect these windows, "
            f"or lower the learning rate; the last checkpoint before it is "
            f"{latest_checkpoint(self.config.output_dir)}"
        )

    def log_row(self) -> None:
        """Write a row with the means since the last one, and start new sums.

        Raises:
            TrainingError: A loss was not finite.
        """
        # `check` has stored the sums as numbers.
        self.check()
        step = self.state.step
        count = self.state.sums.pop(STEPS)
        row: dict[str, Any] = {"step": step}
        for name, total in self.state.sums.items():
            row[name] = total / count

        # Throughput since this start of the run, time since its first start.
        seconds = time.monotonic() - self.start_time
        samples = (step - self.start_step) * self.config.batch_size
        row["samples_per_s"] = samples / seconds
        row["seconds"] = self.previous_seconds + seconds
        self.write(row)

        self.sums = {}
        self.state.sums = {}
        losses = f"video {row['video']:.3f} action {row['action']:.3f}"
        description = f"{losses}, {row['samples_per_s']:.1f} samples/s"
        self.progress.update(self.bar, completed=step, description=description)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row to the file and send it to the trackers, in the main process."""
        if not self.is_main:
            return
        written = {}
        for name, value in row.items():
            written[name] = float(f"{value:.6g}") if name in ROUNDED else value
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(written) + "\n")
        for send in self.sinks:
            send(row)


def _progress_bar(visible: bool) -> Progress:
    """Return a progress bar with the time that has passed and the time that remains."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        disable=not visible,
    )


def make_sink(kind: Tracker, config: RunConfig) -> Sink:
    """Return the function that sends rows to an experiment tracker.

    Args:
        kind: Name of the tracker.
        config: Options of the run, which names it in the tracker.

    Raises:
        MissingExtraError: The tracker is not installed.
    """
    if kind == "tensorboard":
        return _tensorboard_sink(config)
    try:
        tracker = __import__(kind)
    except ImportError as error:
        raise MissingExtraError(kind, "track") from error

    # wandb and trackio have the same interface.
    tracker.init(project="wam-policy", name=config.output_dir.name)

    def send(row: Mapping[str, Any]) -> None:
        """Send a row to wandb or trackio."""
        values = {name: value for name, value in row.items() if name != "step"}
        tracker.log(values, step=row["step"])

    return send


def _tensorboard_sink(config: RunConfig) -> Sink:
    """Return the function that writes rows for TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("tensorboard", "track") from error
    writer = SummaryWriter(str(config.output_dir / "tensorboard"))

    def send(row: Mapping[str, Any]) -> None:
        """Write a row for TensorBoard, and flush it so that it shows at once."""
        for name, value in row.items():
            if name != "step":
                writer.add_scalar(name, value, row["step"])
        writer.flush()

    return send
