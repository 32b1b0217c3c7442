"""Trains a policy on a recorded dataset: a plain loop whose every step is a function of the seed and its number."""

from __future__ import annotations

import copy
import json
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from wam_policy.config import Source
from wam_policy.errors import TrainingError
from wam_policy.hub import frozen
from wam_policy.hub.locate import Download
from wam_policy.models.text import Prompts, untrained_encoder
from wam_policy.models.vae import VAE
from wam_policy.policy import WAMPolicy
from wam_policy.training import family, start
from wam_policy.training.compiled import compile_training
from wam_policy.training.config import CacheConfig, DataConfig, LightTrainConfig, TrainConfig
from wam_policy.training.curve import Curve
from wam_policy.training.examples import Examples, examples, windows_of
from wam_policy.training.latents import encoded
from wam_policy.training.lerobot_reader import LeRobotDataset
from wam_policy.training.optimize import adamw, average, update
from wam_policy.training.sampler import batch_of, generators
from wam_policy.training.state import State, latest, locked, restore, save
from wam_policy.training.validation import held_out, played, validate

logger = logging.getLogger(__name__)


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
    vae = codec_of(config)
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
    whole = examples(config, contract, dataset, vae, prompts)
    held = held_out(len(dataset.episodes), config.validation)[whole.episode.numpy()]
    data, validation = whole.where(~held), whole.where(held)
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
    logger.info("%d windows, %.2f M parameters, %.2f M of them trained", len(data.names), *sizes)
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
                if len(validation.names):
                    curve.write({"step": state.step} | validate(config, policy, validation))
                saved = save(config.out, state, policy, facts, config.keep)
                if config.eval_env is not None and not stop.is_set():
                    curve.write({"step": state.step} | played(config, saved))
            if stop.is_set() and not last:
                raise TrainingError(f"stopped at step {state.step}; it is saved, start the run again to go on")
    return policy.save_pretrained(config.out / "checkpoint", dtype=torch.bfloat16)


def codec_of(config: DataConfig) -> VAE:
    """The codec of a run, in float32."""
    codec = Source(subfolder=config.codec.name)
    return frozen.load_vae(codec, config.codec.parent, Download(), dtype=torch.float32, device=torch.device("cpu"))


def cache(config: CacheConfig) -> Path:
    """Encode a dataset's windows into `config.cache` and return it; what is there already isn't encoded again.

    Raises:
        DatasetError: the dataset is broken, or the cache holds other latents.
    """
    torch.set_num_threads(config.threads)
    dataset = LeRobotDataset(config.dataset)
    encoded(config, family.cameras(config, dataset), codec_of(config), dataset, windows_of(config, dataset))
    return config.cache


def advance(config: TrainConfig | LightTrainConfig, state: State, data: Examples) -> dict[str, Tensor]:
    """One update of the weights; its losses and the norm of its gradients, on the device."""
    index = batch_of(state.step, config.batch_size, len(data.names), config.seed)
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
