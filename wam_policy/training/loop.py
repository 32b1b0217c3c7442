"""Trains a policy on a recorded dataset: a plain loop whose every step is a function of the seed and its number."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from wam_policy.config import PolicyConfig, Source
from wam_policy.errors import ConfigError, DatasetError, TrainingError
from wam_policy.hub import checkpoint, frozen, statistics
from wam_policy.hub.locate import Download
from wam_policy.hub.prompt_cache import PromptCache
from wam_policy.models.build import Model
from wam_policy.models.text import Prompts, TextEncoder, untrained_encoder
from wam_policy.models.vae import VAE
from wam_policy.policy import WAMPolicy
from wam_policy.training import adapters, family, seeing, start
from wam_policy.training.compiled import compile_training
from wam_policy.training.config import CacheConfig, DataConfig, LightTrainConfig, Part, TrainConfig
from wam_policy.training.curve import CURVE, Curve
from wam_policy.training.devices import Devices, joined
from wam_policy.training.examples import Examples, examples, windows_of
from wam_policy.training.latents import codec_fingerprint, encoded
from wam_policy.training.mixture import Mixture
from wam_policy.training.optimize import adamw
from wam_policy.training.sampler import Order
from wam_policy.training.start import Start
from wam_policy.training.state import State, frozen_hash, latest, locked, restore, same_run, save
from wam_policy.training.step import advance, losses_of
from wam_policy.training.validation import held_out, imagined, played, validate
from wam_policy.training.windows import padded_actions

logger = logging.getLogger(__name__)
ModelT = TypeVar("ModelT", bound=nn.Module)


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
        devices.wait()
        return _train(config, devices)


def _train(config: TrainConfig | LightTrainConfig, devices: Devices) -> Path:
    devices.share(config.batch_size // config.accumulate)
    dataset = Mixture(config.dataset, config.camera_map)
    places = config.init if isinstance(config, TrainConfig) else (config.init,)
    with devices.first_alone():  # it alone downloads
        begin = start.read(*places) if places else None
        policy_of, root = (None, None) if begin is None else (begin.policy, begin.root)
        config = replace(config, codec=codec_place(config, policy_of, root))
    if config.cache is None and devices.count > 1:
        config = replace(config, cache=config.out / "latents")
    vae = codec_of(config, devices.device)
    if begin is not None and isinstance(config, TrainConfig) and config.take == "video":
        begin = start.only_video(begin)
    config = family.settled(config, begin)
    contract = family.contract(config, dataset, vae, begin)
    for difference in family.differences(contract, begin):
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
    state = state_of(config, family.new_model(contract, begin, part_of(config)), devices)
    if found is not None:
        restore(found, state)
        gather(state)
        logger.info("going on from %s", found)
    policy = WAMPolicy(contract, state.kept, vae=vae, prompts=prompts)
    logger.info("%d windows, %d process(es), each on %s", len(data.names), devices.count, devices.device)
    if devices.first and (found is None or not statistics.is_of(config.out / family.STATISTICS, dataset.fingerprint())):
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
    rows = seeing.rows_of(config.out / CURVE)
    policy.save_pretrained(config.out / "checkpoint", dtype=torch.bfloat16, notes=seeing.notes(config, facts, rows))
    seeing.curves(rows, config.out / "curves.png")
    futures = imagined(config, policy, shown)
    if futures is not None:
        seeing.contact_sheet(*futures, config.out / "futures.png")


def part_of(config: TrainConfig | LightTrainConfig) -> Part:
    """What of a model is trained; a Light-WAM knows itself."""
    return config.train if isinstance(config, TrainConfig) else "all"


def state_of(config: TrainConfig | LightTrainConfig, model: Model, devices: Devices) -> State:
    """What a run trains, spread over its devices."""
    frozen, average = frozen_hash(model), config.optimizer.ema > 0
    cut, lora = config.shard and devices.count > 1, part_of(config) == "lora"
    kept = copy.deepcopy(model) if cut or lora else None
    if isinstance(config, TrainConfig) and lora:
        adapters.attach(model, rank=config.lora_rank, alpha=config.lora_alpha)
    sizes = [sum(p.numel() for p in model.parameters() if p.requires_grad >= wanted) / 1e6 for wanted in (False, True)]
    logger.info("%.2f M parameters, %.2f M of them trained", *sizes)
    model = model if cut else model.to(devices.device)
    averaged = twin(model, average=True) if average else model
    if cut and average:
        losses_of(config, averaged, devices)
    if kept is None:
        kept = averaged if average else twin(model, average=False)
    elif not cut:
        kept = kept.to(devices.device)
    compile_training(model, backend="inductor" if config.compile else None, checkpointing=config.checkpointing)
    module = losses_of(config, model, devices)
    model.train()
    return State(model, averaged, adamw(model, config.optimizer), module, devices, frozen, kept)


def gather(state: State) -> None:
    """Bring the kept weights up to date, where what is trained has adapters or lies on many devices; elsewhere they are."""
    trained, kept = next(state.averaged.parameters()), next(state.kept.parameters())
    if trained is not kept:
        adapters.copy_merged(state.averaged, state.kept)


def twin(model: ModelT, *, average: bool) -> ModelT:
    """A copy for all but training, which stays as it is when the model is compiled.

    Args:
        model: the model that is trained.
        average: the copy has what is trained for itself, to be averaged; else it shares that too.
    """
    shared = {id(p): p for p in model.parameters() if not (average and p.requires_grad)}
    made = copy.deepcopy(model, shared)
    if average:
        made.requires_grad_(False)
    return made


def write_statistics(config: TrainConfig | LightTrainConfig, dataset: Mixture) -> None:
    """Write the statistics of a dataset beside a run, as the reference has them."""
    action, state = dataset.vector("action"), dataset.vector("observation.state")
    windows, layout = windows_of(config, dataset), family.layout(config, dataset)
    steps = (padded_actions(action, windows, layout, step) for step in range(windows.action_rows.shape[1]))
    place, source = config.out / family.STATISTICS, dataset.fingerprint()
    statistics.write(place, state, action, steps, episodes=len(dataset.episodes), dataset=source)


def prompts_of(
    config: TrainConfig | LightTrainConfig, contract: PolicyConfig, dataset: Mixture, begin: Start | None
) -> Prompts:
    """The prompts of a dataset: as the weights a run begins from know them, else as their text encoder embeds them; and theirs.

    Where there is none, a small encoder with random weights makes embeddings that tell the sentences apart.

    Raises:
        CheckpointError: no text encoder where one was said to be.
        PromptError: no text encoder, and a cache of embeddings that lacks one.
    """
    wanted = sorted({contract.prompt.prompt(sentence) for sentence in dataset.instructions()})
    length, width, source = contract.prompt.token_length, contract.model.text_dim, None if begin is None else begin.text
    theirs = {} if begin is None else begin.prompts
    known = {prompt: embedding.float() for prompt, embedding in theirs.items() if len(embedding) <= length}
    place = config.out if begin is None else begin.root
    if config.text is not None:
        source, place = Source(subfolder=config.text.name), config.text.parent

    def encoder() -> TextEncoder:
        if source is not None:
            return frozen.load_text(source, place, Download(), dtype=torch.float32, device=torch.device("cpu"))
        return untrained_encoder(wanted, width, config.seed)

    if begin is not None and source is None and (new := [prompt for prompt in wanted if prompt not in known]):
        logger.warning("%s has no text encoder, and no embeddings of %s: they get new ones", begin.folder, "; ".join(new))
    cache = None if config.prompt_cache is None else PromptCache(config.prompt_cache, length)
    unknown = cache is not None and source is None  # random embeddings don't go into a cache
    prompts = Prompts(known, token_length=length, text_dim=width, encoder=None if unknown else encoder, cache=cache)
    prompts.add(wanted)
    prompts.drop_encoder()
    told_apart(prompts, wanted)
    return prompts


def told_apart(prompts: Prompts, wanted: Sequence[str]) -> None:
    """Refuse prompts of which nothing is left that tells them apart.

    Raises:
        ConfigError: two have the same embedding, as they were cut.
    """
    seen: dict[str, str] = {}
    for prompt in wanted:
        embedding = prompts.table[prompt]
        twin = seen.setdefault(hashlib.sha256(embedding.float().numpy().tobytes()).hexdigest(), prompt)
        if twin != prompt:
            raise ConfigError(f"{twin!r} and {prompt!r} have the same embedding: raise --token-length {prompts.token_length}")
        if len(embedding) == prompts.token_length:
            logger.warning("%r fills all %d tokens: it may have been cut, --token-length", prompt, prompts.token_length)


def worth(config: TrainConfig | LightTrainConfig, curve: Curve, policy: WAMPolicy, validation: Examples) -> None:
    """Measure the kept weights on the episodes that are held out, if any are, and write a row of it."""
    if curve.state.devices.first and len(validation.names):
        curve.write({"step": curve.state.step} | validate(config, policy, validation))


def play(config: TrainConfig | LightTrainConfig, curve: Curve, checkpoint: Path) -> None:
    """Play the newest checkpoint, if that is wanted, and write a row of its success."""
    if config.eval_env is not None and curve.state.devices.first:
        curve.write({"step": curve.state.step} | played(config, checkpoint))


def codec_place(config: DataConfig, policy: PolicyConfig | None = None, folder: Path | None = None) -> Path:
    """The folder of a run's codec: the one that is named, else that of the policy, and its folder, that it begins from.

    Raises:
        ConfigError: there is neither.
        CheckpointError: it can't be found.
    """
    if config.codec is not None:
        return config.codec
    if policy is None or folder is None:
        raise ConfigError("which video codec? There is no policy to take it from: name its folder, --codec")
    return frozen.folder(policy.vae, folder, Download())


def codec_of(config: DataConfig, device: torch.device) -> VAE:
    """The codec of a run, in float32."""
    place = codec_place(config)
    return frozen.load_vae(Source(subfolder=place.name), place.parent, Download(), dtype=torch.float32, device=device)


def cache(config: CacheConfig) -> Path:
    """Encode a dataset's windows into `config.cache` and return it; what is there already isn't encoded again.

    Raises:
        DatasetError: the dataset is broken, or the cache holds other latents.
    """
    torch.set_num_threads(config.threads)
    dataset = Mixture(config.dataset, config.camera_map)
    with joined(config.device) as devices:
        with devices.first_alone():
            folder = None if config.init is None else start.folder_of(config.init)
            policy = None if folder is None else checkpoint.read_config(folder)
            config = replace(config, codec=codec_place(config, policy, folder))
        config = family.inherited(config, policy)
        vae = codec_of(config, devices.device)
        encoded(config, family.cameras(config, dataset, policy), vae, dataset, windows_of(config, dataset))
    return config.cache


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
