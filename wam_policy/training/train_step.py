"""One update of the weights: draw, compute the losses, go back, clip, step, average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map, tree_map_only

from wam_policy.data.encoded_dataset import Examples
from wam_policy.data.sampler import Order, generators
from wam_policy.models import registry
from wam_policy.models.fast_wam.loss import Batch
from wam_policy.models.fast_wam.variants import VariantName
from wam_policy.models.registry import AnyDraws, Model, Parts
from wam_policy.training.checkpoint import State
from wam_policy.training.config import LightTrainConfig, TrainConfig
from wam_policy.training.distributed import Devices, local
from wam_policy.training.optimizer import average, update

T = TypeVar("T")


class Losses(nn.Module):
    """A model's losses as one module, so that its weights can be replaced for a pass, or spread over devices."""

    def __init__(self, config: TrainConfig | LightTrainConfig, model: Model) -> None:
        super().__init__()
        self.loss, self.variant, self.model = config.loss, variant_of(config), model

    def forward(self, batch: Batch, draws: AnyDraws) -> Parts:
        """The losses of a batch, given its random numbers."""
        return registry.losses_of(self.model, batch, draws, self.loss, self.variant)


class Narrowed(nn.Module):
    """Losses computed in bfloat16: weights are cast for the pass, they themselves and their gradients stay float32."""

    def __init__(self, losses: Losses) -> None:
        super().__init__()
        self.losses = losses

    def forward(self, batch: Batch, draws: AnyDraws) -> Parts:
        """As `Losses`."""
        weights = {name: x.to(torch.bfloat16) for name, x in self.losses.named_parameters()}
        found: Parts = functional_call(self.losses, weights, (batch, draws))
        return found


def losses_of(config: TrainConfig | LightTrainConfig, model: Model, devices: Devices | None = None) -> nn.Module:
    """What computes a model's losses, on all the devices of a run; None: on this one."""
    plain = Losses(config, model)
    compute = getattr(torch, config.compute)
    if devices is not None and devices.count > 1 and config.shard:
        return devices.sharded(plain, compute=compute)
    module = plain if compute == torch.float32 else Narrowed(plain)
    return module if devices is None else devices.copied(module)


def losses(
    config: TrainConfig | LightTrainConfig, model: Model, module: nn.Module, batch: Batch, sources: Sequence[torch.Generator]
) -> Parts:
    """The losses of one batch, with new random numbers: each sample's from a source of its own, on the CPU.

    Args:
        config: of the run.
        model: what learns.
        module: from `losses_of`.
        batch: the samples, on the CPU.
        sources: one for each.
    """
    given: Any = (batch, draws_of(model, batch, sources, variant_of(config)))
    if config.compute != "float32":
        given = tree_map(_narrow, given)
    device = next(module.parameters()).device
    batch, draws = tree_map_only(Tensor, lambda x: x.to(device, non_blocking=True), given)
    found: Parts = module(batch, draws)
    return found


def _narrow(x: Any) -> Any:
    """Anything but flags, and numbers of which there is one a sample: timesteps come from those."""
    return x.to(torch.bfloat16) if isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1 else x


def draws_of(model: Model, batch: Batch, sources: Sequence[torch.Generator], variant: VariantName | None) -> AnyDraws:
    """The random numbers of one batch, each sample's from its own source."""
    samples = [tree_map(lambda x, i=i: None if x is None else x[i : i + 1], batch) for i in range(len(batch.latents))]
    pairs = zip(samples, sources, strict=True)
    return _joined([registry.draws_of(model, sample, source, variant) for sample, source in pairs])


def variant_of(config: TrainConfig | LightTrainConfig) -> VariantName | None:
    """What a Fast-WAM's run trains; a Light-WAM has no variants."""
    return config.variant if isinstance(config, TrainConfig) else None


def _joined(draws: Sequence[T]) -> T:
    """The random numbers of samples as those of a batch."""
    joined: T = tree_map(lambda *x: None if x[0] is None else torch.cat(x), *draws)
    return joined


def advance(config: TrainConfig | LightTrainConfig, state: State, data: Examples, order: Order) -> dict[str, Tensor]:
    """One update of the weights; its losses, over all processes, and the norm of its gradients, on the device."""
    devices = state.devices
    share = devices.share(config.batch_size)
    index, sources = order.batch(state.step)[share], generators(state.step, config.batch_size, config.seed)[share]
    size, sums = len(index) // config.accumulate, dict[str, Tensor]()
    for i in range(config.accumulate):
        part = slice(i * size, (i + 1) * size)
        with devices.accumulating(state.module, last=i == config.accumulate - 1):
            found = losses(config, state.model, state.module, data.batch(index[part]), sources[part])
            (found.total / config.accumulate).backward()
        for name in ("video", "action"):
            value = getattr(found, name).detach() / config.accumulate
            sums[name] = sums[name] + value if name in sums else value
    sums = devices.mean(sums)
    sums["norm"] = update(state.optimizer, config.optimizer, state.step, config.steps)
    if state.averaged is not state.model:
        pairs = zip(state.averaged.parameters(), state.model.parameters(), strict=True)
        averaged, trained = zip(*((local(a), local(b)) for a, b in pairs if b.requires_grad), strict=True)
        average(averaged, trained, config.optimizer.ema, state.step)
    state.step += 1
    return sums
