"""Trains a policy on a recorded dataset: a plain loop whose every step is a function of the seed and its number."""

from __future__ import annotations

import json
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from wam_policy.data.encoded_dataset import Examples, examples, windows_of
from wam_policy.data.latent_cache import codec_fingerprint
from wam_policy.data.mixture import Mixture
from wam_policy.data.sampler import Order
from wam_policy.data.windows import padded_actions
from wam_policy.errors import DatasetError, TrainingError
from wam_policy.hub import dataset_stats
from wam_policy.models.encoders.text import Prompts
from wam_policy.policy import WAMPolicy
from wam_policy.training import initialization, normalization, policy_config, report, resolve
from wam_policy.training.checkpoint import latest, remove_partial, restore, same_run, save
from wam_policy.training.components import codec_of, codec_place, prompts_of
from wam_policy.training.config import LightTrainConfig, TrainConfig
from wam_policy.training.distributed import Devices, joined
from wam_policy.training.metrics import CURVE, Curve
from wam_policy.training.models import gather, part_of, state_of
from wam_policy.training.train_step import advance
from wam_policy.training.validation import held_out, imagined, played, validate
from wam_policy.utils.io import locked

logger = logging.getLogger(__name__)


def train(config: TrainConfig | LightTrainConfig) -> Path:
    """Train, or go on with a run that was stopped, and return the folder of the policy.

    `curve.jsonl` holds the losses, averaged between its rows; at the end `curves.png` draws it, and `futures.png` shows
    imagined futures below real ones. SIGTERM saves and stops.

    Raises:
        TrainingError: a loss that isn't finite, or SIGTERM; the message says what to do.
        DatasetError: a dataset that is broken or has too few windows.
        ConfigError: the folder holds another run.
        CheckpointError: the folder is in use, or a checkpoint can't be read or written.
    """
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    with joined(config.device) as devices, locked(config.out) if devices.first else nullcontext():
        if devices.first:
            remove_partial(config.out)
        devices.wait()
        return _train(config, devices)


def _train(config: TrainConfig | LightTrainConfig, devices: Devices) -> Path:
    devices.share(config.batch_size // config.accumulate)
    dataset = Mixture(config.dataset, config.camera_map)
    places = config.init if isinstance(config, TrainConfig) else (config.init,)
    with devices.first_alone():  # it alone downloads
        begin = initialization.read(*places) if places else None
        policy_of, root = (None, None) if begin is None else (begin.policy, begin.root)
        config = replace(config, codec=codec_place(config, policy_of, root))
    if config.cache is None and devices.count > 1:
        config = replace(config, cache=config.out / "latents")
    vae = codec_of(config, devices.device)
    if begin is not None and isinstance(config, TrainConfig) and config.take == "video":
        begin = initialization.only_video(begin)
    config = resolve.settled(config, begin)
    contract = policy_config.contract(config, dataset, vae, begin)
    for difference in policy_config.differences(contract, begin):
        logger.warning("another contract than the policy's that it begins from: %s", difference)
    table = devices.told(prompts_of(config, contract, dataset, begin).table if devices.first else {})
    prompts = Prompts(table, token_length=contract.prompt.token_length, text_dim=contract.model.text_dim)
    facts = {
        "config": json.loads(json.dumps(asdict(config), default=str)),
        "dataset_sha256": dataset.fingerprint(),
        "codec_sha256": codec_fingerprint(codec_place(config)),
    }
    found = latest(config.out)
    if found is not None:
        same_run(found, facts)
    with devices.first_alone():
        everything = examples(config, contract, dataset, vae, prompts)
    held = held_out(len(dataset.episodes), config.validation)[everything.episode.numpy()]
    if config.validation and not held.any():
        raise DatasetError(
            f"{dataset.folder} has {len(dataset.episodes)} episode: none can be held out, leave out --validation"
        )
    data, validation = everything.where(~held), everything.where(held)
    proprio = contract.model.proprio_dim is not None
    data = data.condensed(proprio=proprio, dtype=getattr(torch, config.compute))
    order = Order(len(data.names), config.batch_size, config.seed, data.weights(config.weights))
    state = state_of(config, initialization.new_model(contract, begin, part_of(config)), devices)
    if found is not None:
        restore(found, state)
        gather(state)
        logger.info("going on from %s", found)
    policy = WAMPolicy(contract, state.kept, vae=vae, prompts=prompts)
    logger.info("%d windows, %d process(es), each on %s", len(data.names), devices.count, devices.device)
    if devices.first and (
        found is None or not dataset_stats.is_of(config.out / normalization.STATISTICS, dataset.fingerprint())
    ):
        write_statistics(config, dataset)
    with Curve(config, state, order, data.names) as curve, stop_wanted() as stop:
        if found is not None:  # what SIGTERM left out
            if state.step % config.save_every == 0 and not curve.holds("val_"):
                worth(config, curve, policy, validation)
            if not curve.holds("success_"):
                play(config, curve, found)
        while state.step < config.steps:
            curve.add(advance(config, state, data, order))
            last, told = state.step == config.steps, state.step % config.log_every == 0
            if told or last:
                curve.row()
            stopped = devices.any(stop.is_set())
            if state.step % config.save_every == 0 or last or stopped:
                curve.check()
                gather(state)
                if not stopped:  # who says SIGTERM says SIGKILL soon
                    worth(config, curve, policy, validation)
                saved = save(config.out, state, policy, facts, config.keep)
                if not stopped:
                    play(config, curve, saved)
            if stopped and not last:
                raise TrainingError(f"stopped at step {state.step}; it is saved, start the run again to go on")
    if devices.first:
        finish(config, facts, policy, validation if len(validation.names) else everything)
    devices.wait()
    return config.out / "checkpoint"


def finish(config: TrainConfig | LightTrainConfig, facts: dict[str, Any], policy: WAMPolicy, shown: Examples) -> None:
    """Write what a run was for: the policy with its card, the curves, futures of some examples."""
    rows = report.rows_of(config.out / CURVE)
    policy.save_pretrained(config.out / "checkpoint", dtype=torch.bfloat16, notes=report.notes(config, facts, rows))
    report.curves(rows, config.out / "curves.png")
    futures = imagined(config, policy, shown)
    if futures is not None:
        report.contact_sheet(*futures, config.out / "futures.png")


def write_statistics(config: TrainConfig | LightTrainConfig, dataset: Mixture) -> None:
    """Write the statistics of a dataset beside a run, as the reference has them."""
    action, state = dataset.vector("action"), dataset.vector("observation.state")
    windows, layout = windows_of(config, dataset), resolve.layout(config, dataset)
    steps = (padded_actions(action, windows, layout, step) for step in range(windows.action_rows.shape[1]))
    place, source = config.out / normalization.STATISTICS, dataset.fingerprint()
    dataset_stats.write(place, state, action, steps, episodes=len(dataset.episodes), dataset=source)


def worth(config: TrainConfig | LightTrainConfig, curve: Curve, policy: WAMPolicy, validation: Examples) -> None:
    """Measure the kept weights on the episodes that are held out, if any are, and write a row of it."""
    if curve.state.devices.first and len(validation.names):
        curve.write({"step": curve.state.step} | validate(config, policy, validation))


def play(config: TrainConfig | LightTrainConfig, curve: Curve, checkpoint: Path) -> None:
    """Play the newest checkpoint, if that is wanted, and write a row of its success."""
    if config.eval_env is not None and curve.state.devices.first:
        curve.write({"step": curve.state.step} | played(config, checkpoint))


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
