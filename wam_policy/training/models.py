"""The models of a run: the one that is trained, its moving average, and the one that is exported."""

from __future__ import annotations

import copy
import logging
from typing import TypeVar

from torch import nn

from wam_policy.models.registry import Model
from wam_policy.training import lora as adapters
from wam_policy.training.checkpoint import State, frozen_hash
from wam_policy.training.compile import compile_training
from wam_policy.training.config import LightTrainConfig, Part, TrainConfig
from wam_policy.training.distributed import Devices
from wam_policy.training.optimizer import adamw
from wam_policy.training.train_step import losses_of

ModelT = TypeVar("ModelT", bound=nn.Module)

logger = logging.getLogger(__name__)


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
