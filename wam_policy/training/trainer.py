"""Trains a policy on a recorded dataset.

The loop is plain, and each step of it is a function of the seed and the step's number, so that a
stopped run resumes bit-exactly.
"""

from __future__ import annotations

import json
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from wam_policy.config import PolicyConfig
from wam_policy.data.encoded_dataset import EncodedDataset, encode_dataset
from wam_policy.data.latent_cache import codec_fingerprint
from wam_policy.data.mixture import Mixture, open_datasets
from wam_policy.data.sampler import DeterministicSampler
from wam_policy.data.windows import padded_actions, policy_windows
from wam_policy.errors import DatasetError, TrainingError
from wam_policy.hub import dataset_stats
from wam_policy.models.encoders.text import PromptEmbeddings
from wam_policy.models.encoders.vae import VAE
from wam_policy.policy import WAMPolicy
from wam_policy.training import initialization, normalization, policy_config, report, resolve
from wam_policy.training.checkpoint import (
    TrainState,
    check_same_run,
    latest_checkpoint,
    remove_partial,
    restore_checkpoint,
    save_checkpoint,
)
from wam_policy.training.components import codec_folder, embed_prompts, load_codec
from wam_policy.training.config import AnyTrainConfig, TrainConfig, pretrained_sources
from wam_policy.training.distributed import DistributedContext, init_processes
from wam_policy.training.initialization import InitWeights
from wam_policy.training.metrics import CURVE, MetricsLogger
from wam_policy.training.models import build_train_state, trainable_part, update_export_model
from wam_policy.training.train_step import train_step
from wam_policy.training.validation import held_out, imagine_clips, rollout_success, validate
from wam_policy.utils.io import locked

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Run:
    """What a run reads before its first step; nothing of it changes while it trains."""

    config: AnyTrainConfig  # resolved
    contract: PolicyConfig
    dataset: Mixture
    vae: VAE
    prompts: PromptEmbeddings
    start: InitWeights | None  # weights that it starts from; None: new ones
    fingerprint: dict[str, Any]  # must be the same when the run is resumed
    checkpoint: Path | None  # that it resumes from


@dataclass(frozen=True)
class _Windows:
    """The encoded windows of a run."""

    all: EncodedDataset
    train: EncodedDataset  # prompts condensed
    validation: EncodedDataset  # of held-out episodes, possibly none
    sampler: DeterministicSampler  # of the windows to train on


def train(config: AnyTrainConfig) -> Path:
    """Train a policy, or resume a run that was stopped.

    `curve.jsonl` holds the losses, averaged between its rows. At the end `curves.png` plots it and
    `futures.png` shows imagined futures below recorded ones. SIGTERM saves a checkpoint and stops.

    Args:
        config: Options of the run.

    Returns:
        Folder of the trained policy.

    Raises:
        TrainingError: A loss is not finite, or SIGTERM arrived; the message says what to do.
        DatasetError: The dataset is broken or has too few windows.
        ActionError: The recorded actions cannot be mapped onto the policy's.
        PromptError: A prompt has no embedding and there is no text encoder.
        ConfigError: The folder holds another run, or options contradict each other.
        CheckpointError: The folder is in use, or a checkpoint cannot be read or written.
        WeightsError: Weights do not match the model.
        CompileError: The blocks cannot be compiled.
        MissingExtraError: A package that an option needs is not installed.
    """
    torch.set_num_threads(config.num_threads)
    torch.manual_seed(config.seed)
    with (
        init_processes(config.device) as processes,
        locked(config.output_dir) if processes.is_main else nullcontext(),
    ):
        if processes.is_main:
            remove_partial(config.output_dir)
        processes.barrier()
        return _train(config, processes)


def _train(config: AnyTrainConfig, processes: DistributedContext) -> Path:
    """Train in the processes of a run, which all call this."""
    # Fails early if a batch cannot be split over the processes.
    processes.local_slice(config.batch_size // config.gradient_accumulation_steps)

    run = _prepare(config, processes)
    windows = _encode(run, processes)
    state = _build_state(run, processes)
    policy = WAMPolicy(run.contract, state.export_model, vae=run.vae, prompts=run.prompts)
    logger.info(
        "%d windows, %d process(es), each on %s",
        len(windows.train.names),
        processes.world_size,
        processes.device,
    )
    if processes.is_main and _lacks_statistics(run):
        write_statistics(run.config, run.dataset)

    _loop(run, windows, state, policy)

    # Held-out windows show more of a policy than those it was trained on.
    if processes.is_main:
        held_out_windows = windows.validation
        examples = held_out_windows if len(held_out_windows.names) else windows.all
        write_outputs(run.config, run.fingerprint, policy, examples)
    processes.barrier()
    return run.config.output_dir / "checkpoint"


def _prepare(config: AnyTrainConfig, processes: DistributedContext) -> _Run:
    """Resolve the options of a run and load its frozen parts.

    Raises:
        ConfigError: The folder holds another run, or options contradict each other.
    """
    # The first process downloads; the others then find the files.
    with processes.main_first():
        dataset = open_datasets(config)
    config, start = _read_start(config, processes)
    if config.cache is None and processes.world_size > 1:
        config = replace(config, cache=config.output_dir / "latents")
    vae = load_codec(config, processes.device)
    if isinstance(config, TrainConfig) and start is not None and config.pretrained_part == "video":
        start = initialization.video_expert_only(start)

    # What neither the options nor the dataset define comes from the pretrained policy.
    config = resolve.resolve_defaults(config, start)
    contract = policy_config.make_policy_config(config, dataset, vae, start)
    for difference in policy_config.config_differences(contract, start):
        logger.warning("the contract differs from the pretrained policy's: %s", difference)

    # The main process alone runs the text encoder.
    embeddings = {}
    if processes.is_main:
        embeddings = embed_prompts(config, contract, dataset, start).table
    prompts = PromptEmbeddings(
        processes.broadcast(embeddings),
        token_length=contract.prompt.token_length,
        text_dim=contract.model.text_dim,
    )

    # A folder of another run is refused before the dataset is encoded.
    fingerprint = _run_fingerprint(config, dataset)
    checkpoint = latest_checkpoint(config.output_dir)
    if checkpoint is not None:
        check_same_run(checkpoint, fingerprint)
    return _Run(
        config=config,
        contract=contract,
        dataset=dataset,
        vae=vae,
        prompts=prompts,
        start=start,
        fingerprint=fingerprint,
        checkpoint=checkpoint,
    )


def _read_start(
    config: AnyTrainConfig, processes: DistributedContext
) -> tuple[AnyTrainConfig, InitWeights | None]:
    """Read the weights that a run starts from; return the config with its codec, and the weights.

    The main process downloads; the others then find the files.
    """
    sources = pretrained_sources(config)
    with processes.main_first():
        if not sources:
            return replace(config, codec=codec_folder(config)), None
        start = initialization.read_init_weights(*sources)
        return replace(config, codec=codec_folder(config, start.policy, start.root)), start


def _run_fingerprint(config: AnyTrainConfig, dataset: Mixture) -> dict[str, Any]:
    """Return options and hashes of a run as JSON; a resumed run must have the same."""
    options = json.dumps(asdict(config), default=str)
    return {
        "config": json.loads(options),
        "dataset_sha256": dataset.fingerprint(),
        "codec_sha256": codec_fingerprint(codec_folder(config)),
    }


def _encode(run: _Run, processes: DistributedContext) -> _Windows:
    """Encode the dataset, and split it into windows to train on and held-out ones.

    Raises:
        DatasetError: There are too few episodes to hold one out, or too few windows for a batch.
    """
    config = run.config
    with processes.main_first():
        windows = encode_dataset(config, run.contract, run.dataset, run.vae, run.prompts)

    # Episodes are held out as a whole: their windows overlap.
    num_episodes = len(run.dataset.episodes)
    held_out_episodes = held_out(num_episodes, config.validation_fraction)
    is_held_out = held_out_episodes[windows.episode.numpy()]
    if config.validation_fraction and not is_held_out.any():
        raise DatasetError(
            f"{run.dataset.folder} has {num_episodes} episode(s), so none can be held out: leave "
            f"out --validation-fraction"
        )
    validation = windows.where(is_held_out)
    training = windows.where(~is_held_out).condensed(
        proprio=run.contract.model.proprio_dim is not None,
        dtype=getattr(torch, config.compute_dtype),
    )
    sampler = DeterministicSampler(
        len(training.names),
        config.batch_size,
        config.seed,
        training.weights(config.dataset_weights),
    )
    return _Windows(all=windows, train=training, validation=validation, sampler=sampler)


def _build_state(run: _Run, processes: DistributedContext) -> TrainState:
    """Build the models and the optimizer, and load the checkpoint that the run resumes from."""
    model = initialization.new_model(run.contract, run.start, trainable_part(run.config))
    # A resumed run builds the same state as a new one, and then overwrites it.
    state = build_train_state(run.config, model, processes)
    if run.checkpoint is not None:
        restore_checkpoint(run.checkpoint, state)
        update_export_model(state)
        logger.info("resuming from %s", run.checkpoint)
    return state


def _loop(run: _Run, windows: _Windows, state: TrainState, policy: WAMPolicy) -> None:
    """Train to the last step, with checkpoints and measurements on the way.

    Raises:
        TrainingError: A loss is not finite, or SIGTERM arrived.
    """
    config = run.config
    names = windows.train.names
    with MetricsLogger(config, state, windows.sampler, names) as curve, stop_requested() as stop:
        if run.checkpoint is not None:
            _measure_missing(run.checkpoint, config, curve, policy, windows.validation)
        while state.step < config.steps:
            curve.add_step(train_step(config, state, windows.train, windows.sampler))
            is_last = state.step == config.steps
            if state.step % config.logging_steps == 0 or is_last:
                curve.log_row()

            # If one process was asked to stop, all do.
            stopped = state.processes.any_process(stop.is_set())
            if state.step % config.save_steps == 0 or is_last or stopped:
                _save_and_measure(run, curve, policy, windows.validation, measure=not stopped)
            if stopped and not is_last:
                raise TrainingError(
                    f"stopped at step {state.step}; a checkpoint is saved, start the run again to "
                    f"resume"
                )


def _measure_missing(
    checkpoint: Path,
    config: AnyTrainConfig,
    curve: MetricsLogger,
    policy: WAMPolicy,
    validation: EncodedDataset,
) -> None:
    """Make the measurements at the resumed checkpoint that SIGTERM left no time for."""
    if curve.state.step % config.save_steps == 0 and not curve.has_metric("val_"):
        run_validation(config, curve, policy, validation)
    if not curve.has_metric(report.SUCCESS):
        run_rollouts(config, curve, checkpoint)


def _save_and_measure(
    run: _Run, curve: MetricsLogger, policy: WAMPolicy, validation: EncodedDataset, *, measure: bool
) -> None:
    """Save a checkpoint; measure it, unless SIGKILL is about to follow a SIGTERM."""
    config = run.config
    state = curve.state
    # Do not save weights after a loss that was not finite.
    curve.check()
    update_export_model(state)
    if measure:
        run_validation(config, curve, policy, validation)
    checkpoint = save_checkpoint(
        config.output_dir, state, policy, run.fingerprint, config.save_total_limit
    )
    if measure:
        run_rollouts(config, curve, checkpoint)


def write_outputs(
    config: AnyTrainConfig,
    facts: dict[str, Any],
    policy: WAMPolicy,
    shown: EncodedDataset,
) -> None:
    """Write the results of a finished run: the policy, the plot of the curve, imagined futures.

    Args:
        config: Resolved options of the run.
        facts: Its fingerprint.
        policy: Policy with the exported model.
        shown: Windows to imagine the future of.
    """
    rows = report.read_rows(config.output_dir / CURVE)
    notes = report.card_notes(config, facts, rows)
    policy.save_pretrained(config.output_dir / "checkpoint", dtype=torch.bfloat16, notes=notes)

    report.plot_curves(rows, config.output_dir / "curves.png")
    futures = imagine_clips(config, policy, shown)
    if futures is not None:
        recorded, imagined = futures
        report.contact_sheet(recorded, imagined, config.output_dir / "futures.png")


def _lacks_statistics(run: _Run) -> bool:
    """Return whether a run is new, or its folder lacks the statistics of its dataset."""
    if run.checkpoint is None:
        return True
    path = run.config.output_dir / normalization.STATISTICS
    return not dataset_stats.was_computed_from(path, run.dataset.fingerprint())


def write_statistics(config: AnyTrainConfig, dataset: Mixture) -> None:
    """Write the statistics of a dataset into the folder of a run, in the reference's format.

    Args:
        config: Resolved options of the run.
        dataset: Data that it trains on.
    """
    layout = resolve.action_layout(config, dataset)
    action = dataset.actions(layout)
    windows = policy_windows(dataset, config)
    horizon = windows.action_rows.shape[1]

    # A generator, so that only one step of all chunks is in memory at a time.
    steps = (padded_actions(action, windows, layout, step) for step in range(horizon))
    dataset_stats.write_stats(
        config.output_dir / normalization.STATISTICS,
        dataset.states(),
        action,
        steps,
        episodes=len(dataset.episodes),
        dataset=dataset.fingerprint(),
    )


def run_validation(
    config: AnyTrainConfig,
    curve: MetricsLogger,
    policy: WAMPolicy,
    validation: EncodedDataset,
) -> None:
    """Evaluate the exported model on the held-out windows, if there are any, and write a row.

    Args:
        config: Resolved options of the run.
        curve: Curve to write the row to.
        policy: Policy with the exported model.
        validation: Held-out windows.
    """
    if curve.state.processes.is_main and len(validation.names):
        curve.write({"step": curve.state.step} | validate(config, policy, validation))


def run_rollouts(config: AnyTrainConfig, curve: MetricsLogger, checkpoint: Path) -> None:
    """Roll a checkpoint out in the run's environment, if it has one, and write a row.

    Args:
        config: Resolved options of the run.
        curve: Curve to write the row to.
        checkpoint: Folder of the checkpoint.
    """
    if config.eval_env is not None and curve.state.processes.is_main:
        curve.write({"step": curve.state.step} | rollout_success(config, checkpoint))


@contextmanager
def stop_requested() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM sets; only the main thread can receive signals."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous_handler = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous_handler)
