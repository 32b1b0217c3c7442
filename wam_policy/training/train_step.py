"""One update of the weights: draw, compute the losses, go back, clip, step, average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map, tree_map_only

from wam_policy.data.encoded_dataset import EncodedDataset
from wam_policy.data.sampler import DeterministicSampler, sample_generators
from wam_policy.models import registry
from wam_policy.models.fast_wam.loss import Batch, LossOutput
from wam_policy.models.fast_wam.variants import VariantName
from wam_policy.models.registry import AnyTrainingNoise, Model
from wam_policy.training.checkpoint import TrainState
from wam_policy.training.config import LightTrainConfig, TrainConfig
from wam_policy.training.distributed import ProcessGroup, local_tensor
from wam_policy.training.optimizer import optimizer_step, update_ema

T = TypeVar("T")


class LossModule(nn.Module):
    """A model's losses as one module, so that its weights can be replaced for a pass, or spread over devices."""

    def __init__(self, config: TrainConfig | LightTrainConfig, model: Model) -> None:
        super().__init__()
        self.loss, self.variant, self.model = config.loss, variant_of(config), model

    def forward(self, batch: Batch, draws: AnyTrainingNoise) -> LossOutput:
        """The losses of a batch, given its random numbers."""
        return registry.compute_losses(self.model, batch, draws, self.loss, self.variant)


class Bfloat16Losses(nn.Module):
    """Losses computed in bfloat16: weights are cast for the pass, they themselves and their gradients stay float32."""

    def __init__(self, losses: LossModule) -> None:
        super().__init__()
        self.losses = losses

    def forward(self, batch: Batch, draws: AnyTrainingNoise) -> LossOutput:
        """As `Losses`."""
        weights = {name: x.to(torch.bfloat16) for name, x in self.losses.named_parameters()}
        found: LossOutput = functional_call(self.losses, weights, (batch, draws))
        return found


def build_loss_module(
    config: TrainConfig | LightTrainConfig, model: Model, devices: ProcessGroup | None = None
) -> nn.Module:
    """What computes a model's losses, on all the devices of a run; None: on this one."""
    plain = LossModule(config, model)
    compute = getattr(torch, config.compute_dtype)
    if devices is not None and devices.world_size > 1 and config.fsdp:
        return devices.wrap_fsdp(plain, compute=compute)
    module = plain if compute == torch.float32 else Bfloat16Losses(plain)
    return module if devices is None else devices.wrap_ddp(module)


def batch_losses(
    config: TrainConfig | LightTrainConfig,
    model: Model,
    module: nn.Module,
    batch: Batch,
    sources: Sequence[torch.Generator],
) -> LossOutput:
    """The losses of one batch, with new random numbers: each sample's from a source of its own, on the CPU.

    Args:
        config: of the run.
        model: what learns.
        module: from `losses_of`.
        batch: the samples, on the CPU.
        sources: one for each.
    """
    given: Any = (batch, sample_batch_noise(model, batch, sources, variant_of(config)))
    if config.compute_dtype != "float32":
        given = tree_map(_narrow, given)
    device = next(module.parameters()).device
    batch, draws = tree_map_only(Tensor, lambda x: x.to(device, non_blocking=True), given)
    found: LossOutput = module(batch, draws)
    return found


def _narrow(x: Any) -> Any:
    """Anything but flags, and numbers of which there is one a sample: timesteps come from those."""
    return (
        x.to(torch.bfloat16)
        if isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1
        else x
    )


def sample_batch_noise(
    model: Model, batch: Batch, sources: Sequence[torch.Generator], variant: VariantName | None
) -> AnyTrainingNoise:
    """The random numbers of one batch, each sample's from its own source."""
    samples = [
        tree_map(lambda x, i=i: None if x is None else x[i : i + 1], batch)
        for i in range(len(batch.latents))
    ]
    pairs = zip(samples, sources, strict=True)
    return _joined(
        [registry.sample_noise(model, sample, source, variant) for sample, source in pairs]
    )


def variant_of(config: TrainConfig | LightTrainConfig) -> VariantName | None:
    """What a Fast-WAM's run trains; a Light-WAM has no variants."""
    return config.variant if isinstance(config, TrainConfig) else None


def _joined(draws: Sequence[T]) -> T:
    """The random numbers of samples as those of a batch."""
    joined: T = tree_map(lambda *x: None if x[0] is None else torch.cat(x), *draws)
    return joined


def train_step(
    config: TrainConfig | LightTrainConfig,
    state: TrainState,
    data: EncodedDataset,
    order: DeterministicSampler,
) -> dict[str, Tensor]:
    """One update of the weights; its losses, over all processes, and the norm of its gradients, on the device."""
    devices = state.processes
    share = devices.local_slice(config.batch_size)
    index, sources = (
        order.batch(state.step)[share],
        sample_generators(state.step, config.batch_size, config.seed)[share],
    )
    size, sums = len(index) // config.gradient_accumulation_steps, dict[str, Tensor]()
    for i in range(config.gradient_accumulation_steps):
        part = slice(i * size, (i + 1) * size)
        with devices.accumulate(
            state.loss_module, last=i == config.gradient_accumulation_steps - 1
        ):
            found = batch_losses(
                config, state.model, state.loss_module, data.batch(index[part]), sources[part]
            )
            (found.total / config.gradient_accumulation_steps).backward()
        for name in ("video", "action"):
            value = getattr(found, name).detach() / config.gradient_accumulation_steps
            sums[name] = sums[name] + value if name in sums else value
    sums = devices.all_reduce_mean(sums)
    sums["norm"] = optimizer_step(state.optimizer, config.optimizer, state.step, config.steps)
    if state.ema_model is not state.model:
        pairs = zip(state.ema_model.parameters(), state.model.parameters(), strict=True)
        averaged, trained = zip(
            *((local_tensor(a), local_tensor(b)) for a, b in pairs if b.requires_grad), strict=True
        )
        update_ema(averaged, trained, config.optimizer.ema_decay, state.step)
    state.step += 1
    return sums
