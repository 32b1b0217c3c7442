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

from wam_policy.data.encoded_dataset import EncodedDataset, encode_dataset, windows_of
from wam_policy.data.latent_cache import codec_fingerprint
from wam_policy.data.mixture import Mixture
from wam_policy.data.sampler import DeterministicSampler
from wam_policy.data.windows import padded_actions
from wam_policy.errors import DatasetError, TrainingError
from wam_policy.hub import dataset_stats
from wam_policy.models.encoders.text import PromptEmbeddings
from wam_policy.policy import WAMPolicy
from wam_policy.training import initialization, normalization, policy_config, report, resolve
from wam_policy.training.checkpoint import (
    check_same_run,
    latest_checkpoint,
    remove_partial,
    restore_checkpoint,
    save_checkpoint,
)
from wam_policy.training.components import codec_folder, embed_prompts, load_codec
from wam_policy.training.config import LightTrainConfig, TrainConfig
from wam_policy.training.distributed import ProcessGroup, init_processes
from wam_policy.training.metrics import CURVE, MetricsLogger
from wam_policy.training.models import build_train_state, trainable_part, update_export_model
from wam_policy.training.train_step import train_step
from wam_policy.training.validation import held_out, imagine_clips, rollout_success, validate
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
    torch.set_num_threads(config.num_threads)
    torch.manual_seed(config.seed)
    with (
        init_processes(config.device) as devices,
        locked(config.output_dir) if devices.is_main else nullcontext(),
    ):
        if devices.is_main:
            remove_partial(config.output_dir)
        devices.barrier()
        return _train(config, devices)


def _train(config: TrainConfig | LightTrainConfig, devices: ProcessGroup) -> Path:
    devices.local_slice(config.batch_size // config.gradient_accumulation_steps)
    dataset = Mixture(config.dataset, config.camera_map)
    places = (
        config.pretrained_path if isinstance(config, TrainConfig) else (config.pretrained_path,)
    )
    with devices.main_first():  # it alone downloads
        begin = initialization.read_init_weights(*places) if places else None
        policy_of, root = (None, None) if begin is None else (begin.policy, begin.root)
        config = replace(config, codec=codec_folder(config, policy_of, root))
    if config.cache is None and devices.world_size > 1:
        config = replace(config, cache=config.output_dir / "latents")
    vae = load_codec(config, devices.device)
    if begin is not None and isinstance(config, TrainConfig) and config.pretrained_part == "video":
        begin = initialization.video_expert_only(begin)
    config = resolve.resolve_defaults(config, begin)
    contract = policy_config.make_policy_config(config, dataset, vae, begin)
    for difference in policy_config.config_differences(contract, begin):
        logger.warning("another contract than the policy's that it begins from: %s", difference)
    table = devices.broadcast(
        embed_prompts(config, contract, dataset, begin).table if devices.is_main else {}
    )
    prompts = PromptEmbeddings(
        table, token_length=contract.prompt.token_length, text_dim=contract.model.text_dim
    )
    facts = {
        "config": json.loads(json.dumps(asdict(config), default=str)),
        "dataset_sha256": dataset.fingerprint(),
        "codec_sha256": codec_fingerprint(codec_folder(config)),
    }
    found = latest_checkpoint(config.output_dir)
    if found is not None:
        check_same_run(found, facts)
    with devices.main_first():
        everything = encode_dataset(config, contract, dataset, vae, prompts)
    held = held_out(len(dataset.episodes), config.validation_fraction)[everything.episode.numpy()]
    if config.validation_fraction and not held.any():
        raise DatasetError(
            f"{dataset.folder} has {len(dataset.episodes)} episode: none can be held out, leave out --validation-fraction"
        )
    data, validation = everything.where(~held), everything.where(held)
    proprio = contract.model.proprio_dim is not None
    data = data.condensed(proprio=proprio, dtype=getattr(torch, config.compute_dtype))
    order = DeterministicSampler(
        len(data.names), config.batch_size, config.seed, data.weights(config.dataset_weights)
    )
    state = build_train_state(
        config, initialization.new_model(contract, begin, trainable_part(config)), devices
    )
    if found is not None:
        restore_checkpoint(found, state)
        update_export_model(state)
        logger.info("going on from %s", found)
    policy = WAMPolicy(contract, state.export_model, vae=vae, prompts=prompts)
    logger.info(
        "%d windows, %d process(es), each on %s",
        len(data.names),
        devices.world_size,
        devices.device,
    )
    if devices.is_main and (
        found is None
        or not dataset_stats.was_computed_from(
            config.output_dir / normalization.STATISTICS, dataset.fingerprint()
        )
    ):
        write_statistics(config, dataset)
    with MetricsLogger(config, state, order, data.names) as curve, stop_requested() as stop:
        if found is not None:  # what SIGTERM left out
            if state.step % config.save_steps == 0 and not curve.holds("val_"):
                run_validation(config, curve, policy, validation)
            if not curve.holds("success_"):
                run_rollouts(config, curve, found)
        while state.step < config.steps:
            curve.add_step(train_step(config, state, data, order))
            last, told = state.step == config.steps, state.step % config.logging_steps == 0
            if told or last:
                curve.log_row()
            stopped = devices.any_process(stop.is_set())
            if state.step % config.save_steps == 0 or last or stopped:
                curve.check()
                update_export_model(state)
                if not stopped:  # who says SIGTERM says SIGKILL soon
                    run_validation(config, curve, policy, validation)
                saved = save_checkpoint(
                    config.output_dir, state, policy, facts, config.save_total_limit
                )
                if not stopped:
                    run_rollouts(config, curve, saved)
            if stopped and not last:
                raise TrainingError(
                    f"stopped at step {state.step}; it is saved, start the run again to go on"
                )
    if devices.is_main:
        write_outputs(config, facts, policy, validation if len(validation.names) else everything)
    devices.barrier()
    return config.output_dir / "checkpoint"


def write_outputs(
    config: TrainConfig | LightTrainConfig,
    facts: dict[str, Any],
    policy: WAMPolicy,
    shown: EncodedDataset,
) -> None:
    """Write what a run was for: the policy with its card, the curves, futures of some examples."""
    rows = report.read_rows(config.output_dir / CURVE)
    policy.save_pretrained(
        config.output_dir / "checkpoint",
        dtype=torch.bfloat16,
        notes=report.card_notes(config, facts, rows),
    )
    report.plot_curves(rows, config.output_dir / "curves.png")
    futures = imagine_clips(config, policy, shown)
    if futures is not None:
        report.contact_sheet(*futures, config.output_dir / "futures.png")


def write_statistics(config: TrainConfig | LightTrainConfig, dataset: Mixture) -> None:
    """Write the statistics of a dataset beside a run, as the reference has them."""
    action, state = dataset.vector("action"), dataset.vector("observation.state")
    windows, layout = windows_of(config, dataset), resolve.action_layout(config, dataset)
    steps = (
        padded_actions(action, windows, layout, step)
        for step in range(windows.action_rows.shape[1])
    )
    place, source = config.output_dir / normalization.STATISTICS, dataset.fingerprint()
    dataset_stats.write_stats(
        place, state, action, steps, episodes=len(dataset.episodes), dataset=source
    )


def run_validation(
    config: TrainConfig | LightTrainConfig,
    curve: MetricsLogger,
    policy: WAMPolicy,
    validation: EncodedDataset,
) -> None:
    """Measure the kept weights on the episodes that are held out, if any are, and write a row of it."""
    if curve.state.processes.is_main and len(validation.names):
        curve.write({"step": curve.state.step} | validate(config, policy, validation))


def run_rollouts(
    config: TrainConfig | LightTrainConfig, curve: MetricsLogger, checkpoint: Path
) -> None:
    """Play the newest checkpoint, if that is wanted, and write a row of its success."""
    if config.eval_env is not None and curve.state.processes.is_main:
        curve.write({"step": curve.state.step} | rollout_success(config, checkpoint))


@contextmanager
def stop_requested() -> Iterator[threading.Event]:
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
