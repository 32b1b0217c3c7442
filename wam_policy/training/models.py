"""The models of a run: the one that is trained, its moving average, and the one that is exported."""

from __future__ import annotations

import copy
import logging
from typing import TypeVar

from torch import nn

from wam_policy.models.registry import Model
from wam_policy.training import lora as adapters
from wam_policy.training.checkpoint import TrainState, frozen_hash
from wam_policy.training.compile import compile_training
from wam_policy.training.config import LightTrainConfig, Part, TrainConfig
from wam_policy.training.distributed import ProcessGroup
from wam_policy.training.optimizer import adamw
from wam_policy.training.train_step import build_loss_module

ModelT = TypeVar("ModelT", bound=nn.Module)

logger = logging.getLogger(__name__)


def trainable_part(config: TrainConfig | LightTrainConfig) -> Part:
    """What of a model is trained; a Light-WAM knows itself."""
    return config.trainable if isinstance(config, TrainConfig) else "all"


def build_train_state(
    config: TrainConfig | LightTrainConfig, model: Model, devices: ProcessGroup
) -> TrainState:
    """What a run trains, spread over its devices."""
    frozen, average = frozen_hash(model), config.optimizer.ema_decay > 0
    cut, lora = config.fsdp and devices.world_size > 1, trainable_part(config) == "lora"
    kept = copy.deepcopy(model) if cut or lora else None
    if isinstance(config, TrainConfig) and lora:
        adapters.attach_adapters(model, rank=config.lora_rank, alpha=config.lora_alpha)
    sizes = [
        sum(p.numel() for p in model.parameters() if p.requires_grad >= wanted) / 1e6
        for wanted in (False, True)
    ]
    logger.info("%.2f M parameters, %.2f M of them trained", *sizes)
    model = model if cut else model.to(devices.device)
    averaged = copy_model(model, average=True) if average else model
    if cut and average:
        build_loss_module(config, averaged, devices)
    if kept is None:
        kept = averaged if average else copy_model(model, average=False)
    elif not cut:
        kept = kept.to(devices.device)
    compile_training(
        model,
        backend="inductor" if config.compile else None,
        checkpointing=config.gradient_checkpointing,
    )
    module = build_loss_module(config, model, devices)
    model.train()
    return TrainState(
        model, averaged, adamw(model, config.optimizer), module, devices, frozen, kept
    )


def update_export_model(state: TrainState) -> None:
    """Bring the kept weights up to date, where what is trained has adapters or lies on many devices; elsewhere they are."""
    trained, kept = next(state.ema_model.parameters()), next(state.export_model.parameters())
    if trained is not kept:
        adapters.copy_merged(state.ema_model, state.export_model)


def copy_model(model: ModelT, *, average: bool) -> ModelT:
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
