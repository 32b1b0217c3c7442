"""Trains a policy on a recorded dataset: a plain loop whose every step is a function of the seed and its number."""

from __future__ import annotations

import copy
import json
import logging
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from wam_policy.config import Source
from wam_policy.errors import TrainingError
from wam_policy.hub import frozen
from wam_policy.hub.atomic import write_text
from wam_policy.hub.locate import Download
from wam_policy.models.text import Prompts, untrained_encoder
from wam_policy.policy import WAMPolicy
from wam_policy.training import family, start
from wam_policy.training.compiled import compile_training
from wam_policy.training.config import LightTrainConfig, TrainConfig
from wam_policy.training.examples import Examples, examples
from wam_policy.training.lerobot_reader import LeRobotDataset
from wam_policy.training.optimize import adamw, average, update
from wam_policy.training.sampler import batch_of, generators
from wam_policy.training.state import State, latest, locked, restore, save

logger = logging.getLogger(__name__)
CURVE = "curve.jsonl"


def train(config: TrainConfig | LightTrainConfig) -> Path:
    """Train, or go on with a run that was stopped, and return the folder of the policy.

    `curve.jsonl` holds the losses, averaged between its rows. SIGTERM saves and stops.

    Raises:
        TrainingError: a loss that isn't finite, or SIGTERM; the message says what to do.
        DatasetError: a dataset that is broken or has too few windows.
        ConfigError: the folder holds another run.
        CheckpointError: the folder is in use, or a checkpoint can't be read or written.
    """
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    with locked(config.out), stop_wanted() as stop:
        return _train(config, stop)


def _train(config: TrainConfig | LightTrainConfig, stop: threading.Event) -> Path:
    dataset = LeRobotDataset(config.dataset)
    codec = Source(subfolder=config.codec.name)
    vae = frozen.load_vae(codec, config.codec.parent, Download(), dtype=torch.float32, device=torch.device("cpu"))
    folders = config.init if isinstance(config, TrainConfig) else (config.init,)
    begin = start.read(*folders) if folders else None
    config = family.settled(config, begin)
    contract = family.contract(config, dataset, vae, begin)
    texts = sorted({contract.prompt.prompt(sentence) for sentence in dataset.instructions()})
    prompts = Prompts(
        {},
        token_length=config.token_length,
        text_dim=contract.model.text_dim,
        encoder=lambda: untrained_encoder(texts, contract.model.text_dim, config.seed),
    )
    data = examples(config, contract, dataset, vae, prompts)
    model = family.new_model(contract, begin)
    averaged = model
    if config.optimizer.ema:  # what is frozen is shared, not copied
        shared = {id(p): p for p in model.parameters() if not p.requires_grad}
        averaged = copy.deepcopy(model, shared).requires_grad_(False)
    state = State(model, averaged, adamw(model, config.optimizer))
    facts = {"config": json.loads(json.dumps(asdict(config), default=str)), "dataset_sha256": dataset.fingerprint()}
    found = latest(config.out)
    if found is not None:
        restore(found, state, facts)
        logger.info("going on from %s", found)
    sizes = [sum(p.numel() for p in model.parameters() if p.requires_grad >= wanted) / 1e6 for wanted in (False, True)]
    logger.info("%d windows, %.2f M parameters, %.2f M of them trained", len(data.latents), *sizes)
    compile_training(model, backend="inductor" if config.compile else None, checkpointing=config.checkpointing)
    policy = WAMPolicy(contract, averaged, vae=vae, prompts=prompts)
    model.train()
    with Curve(config, state, data.names) as curve:
        while state.step < config.steps:
            curve.add(advance(config, state, data))
            last = state.step == config.steps
            if state.step % config.log_every == 0 or last:
                curve.row()
            if state.step % config.save_every == 0 or last or stop.is_set():
                curve.check()
                save(config.out, state, policy, facts, config.keep)
            if stop.is_set() and not last:
                raise TrainingError(f"stopped at step {state.step}; it is saved, start the run again to go on")
    return policy.save_pretrained(config.out / "checkpoint", dtype=torch.bfloat16)


def advance(config: TrainConfig | LightTrainConfig, state: State, data: Examples) -> dict[str, Tensor]:
    """One update of the weights; its losses and the norm of its gradients, on the device."""
    index = batch_of(state.step, config.batch_size, len(data.latents), config.seed)
    sources = generators(state.step, config.batch_size, config.seed)
    size, sums = config.batch_size // config.accumulate, dict[str, Tensor]()
    for i in range(config.accumulate):
        part = slice(i * size, (i + 1) * size)
        losses = family.losses(config, state.model, data.batch(index[part]), sources[part])
        (losses.total / config.accumulate).backward()
        for name in ("video", "action"):
            value = getattr(losses, name).detach() / config.accumulate
            sums[name] = sums[name] + value if name in sums else value
    sums["norm"] = update(state.optimizer, config.optimizer, state.step, config.steps)
    if state.averaged is not state.model:
        pairs = zip(state.averaged.parameters(), state.model.parameters(), strict=True)
        averaged, trained = zip(*((a, b) for a, b in pairs if b.requires_grad), strict=True)
        average(averaged, trained, config.optimizer.ema, state.step)
    state.step += 1
    return sums


class Curve:
    """The losses of a run: summed on the device, written as a row now and then, shown while it runs."""

    def __init__(self, config: TrainConfig | LightTrainConfig, state: State, names: Sequence[str]) -> None:
        """Begin, or go on after the rows that a stopped run wrote up to its checkpoint; `names` are the examples'."""
        self.config, self.state, self.names, self.path = config, state, names, config.out / CURVE
        rows = self.path.read_text().splitlines(keepends=True) if self.path.is_file() else []
        kept = [row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= state.step]
        write_text(self.path, "".join(kept))
        self.before = json.loads(kept[-1])["seconds"] if kept else 0.0
        self.began, self.progress = time.monotonic(), Progress()
        self.sums = {name: torch.tensor(value) for name, value in state.sums.items()}
        self.first_bad: Tensor | None = None

    def __enter__(self) -> Curve:
        self.progress.start()
        self.bar = self.progress.add_task("training", total=self.config.steps, completed=self.state.step)
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def add(self, numbers: dict[str, Tensor]) -> None:
        """Add a step's numbers; nothing is waited for."""
        self.sums = {name: self.sums[name] + x if name in self.sums else x for name, x in numbers.items()}
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
            step, config = int(self.first_bad), self.config
            index = batch_of(step - 1, config.batch_size, len(self.names), config.seed).tolist()
            raise TrainingError(
                f"a loss or gradient isn't finite in step {step}, on {config.dataset}: "
                f"{', '.join(self.names[i] for i in index)}; look at these, or lower the learning rate; the last checkpoint, "
                f"before it, is {latest(config.out)}"
            )

    def row(self) -> None:
        """Write a row of averages since the last one, and begin anew."""
        self.check()
        step, config = self.state.step, self.config
        every = (step - 1) % config.log_every + 1
        row: dict[str, Any] = {"step": step} | {name: total / every for name, total in self.state.sums.items()}
        row |= {"seconds": round(self.before + time.monotonic() - self.began, 1)}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.sums, self.state.sums = {}, {}
        self.progress.update(self.bar, completed=step, description=f"video {row['video']:.3f} action {row['action']:.3f}")


@contextmanager
def stop_wanted() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, where this is the main thread."""
    wanted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield wanted
        return
    before = signal.signal(signal.SIGTERM, lambda *_: wanted.set())
    try:
        yield wanted
    finally:
        signal.signal(signal.SIGTERM, before)
