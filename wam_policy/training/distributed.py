"""The processes of a run, one a device: who they are, how a model is spread over them, what they tell each other.

Without `torchrun` there is one. Copies of the whole model (DDP) go through accelerate; a model cut into shards (FSDP2) is
PyTorch's own `fully_shard`, which accelerate calls too, but on GPUs only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wam_policy.errors import ConfigError, MissingExtraError
from wam_policy.models.layers.transformer import Block

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

T = TypeVar("T")
TIMEOUT = timedelta(
    hours=4
)  # that processes wait for the first one, which alone encodes, validates and plays


@dataclass(frozen=True)
class ProcessGroup:
    """This process among those of a run."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    accelerator: Any = None  # accelerate's, where there are several
    mesh: Any = None  # PyTorch's, likewise
    cpu_group: Any = None  # a group of theirs on the CPU: what is said there waits for no device

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def local_slice(self, total: int) -> slice:
        """This process' part of a batch.

        Raises:
            ConfigError: it can't be cut into equal parts.
        """
        if total % self.world_size:
            raise ConfigError(
                f"a batch of {total} can't be computed by {self.world_size} processes in equal parts"
            )
        size = total // self.world_size
        return slice(self.rank * size, (self.rank + 1) * size)

    def wrap_ddp(self, module: nn.Module) -> nn.Module:
        """A module whose gradients are those of all processes' samples; each has all of its weights."""
        return module if self.accelerator is None else self.accelerator.prepare_model(module)

    def wrap_fsdp(self, module: nn.Module, *, compute: torch.dtype) -> nn.Module:
        """The same, its weights, gradients and what the optimizer keeps cut over the processes, a block at a time."""
        from torch.distributed.fsdp import (
            MixedPrecisionPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        narrow = None if compute == torch.float32 else compute
        policy = MixedPrecisionPolicy(
            param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for block in [part for part in module.modules() if isinstance(part, Block)]:
            fully_shard(block, mesh=self.mesh, mp_policy=policy)
            register_fsdp_forward_method(block, "self_key_value")
        fully_shard(module, mesh=self.mesh, mp_policy=policy)
        return module

    def accumulate(self, module: nn.Module, *, last: bool) -> Any:
        """Inside, gradients are only added up; with the last part of a batch they are exchanged."""
        if self.world_size == 1 or is_sharded(
            module
        ):  # of shards every part's are exchanged: whole gradients are kept nowhere
            return nullcontext()
        return nullcontext() if last else self.accelerator.no_sync(module)

    def all_reduce_mean(self, numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The means of some numbers over all processes, on the device."""
        if self.world_size == 1:
            return dict(numbers)
        together = torch.stack([x.float() for x in numbers.values()])
        dist.all_reduce(together)
        return dict(zip(numbers, (together / self.world_size).unbind(), strict=True))

    def any_process(self, wanted: bool) -> bool:
        """Whether any process wants something; all must ask."""
        if self.world_size == 1:
            return wanted
        flag = torch.tensor(float(wanted))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.cpu_group)
        return bool(flag)

    def broadcast(self, value: T) -> T:
        """What the first process has; all must ask."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.cpu_group)
        return box[0]

    def barrier(self) -> None:
        """Wait for the others."""
        if self.world_size > 1:
            dist.barrier()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The first process goes through, then the others."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()


def is_sharded(module: nn.Module) -> bool:
    """Whether a module's weights are cut over processes."""
    return any(hasattr(parameter, "to_local") for parameter in module.parameters())


def local_tensor(x: Tensor) -> Tensor:
    """What of a tensor lies here."""
    return x.to_local() if hasattr(x, "to_local") else x


def full_tensor(x: Tensor) -> Tensor:
    """All of a tensor; where it is cut, every process must ask."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def shard_like(x: Tensor, other: Tensor) -> Tensor:
    """Numbers that lie here as a part of a tensor that is cut as another is."""
    if not hasattr(other, "to_local") or x.shape != other.to_local().shape or x.ndim == 0:
        return x
    from torch.distributed.tensor import DTensor

    cut: DTensor = other  # type: ignore[assignment]  # it has `to_local`
    return DTensor.from_local(
        x, cut.device_mesh, cut.placements, shape=cut.shape, stride=cut.stride()
    )


@contextmanager
def init_processes(device: str) -> Iterator[ProcessGroup]:
    """The processes that `torchrun` started; without it, this one alone.

    Raises:
        ConfigError: there is no such device.
        MissingExtraError: accelerate isn't installed.
    """
    kind = torch.device(device)
    if kind.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"`device` {device!r}: PyTorch finds no CUDA device; say --device cpu, or install its CUDA build"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ProcessGroup(kind)
        return
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
    except ImportError as error:
        raise MissingExtraError("accelerate", "train") from error
    unused = DistributedDataParallelKwargs(
        find_unused_parameters=True
    )  # what only a loss reads that is left out
    patient = InitProcessGroupKwargs(timeout=TIMEOUT)
    accelerator = Accelerator(cpu=kind.type == "cpu", kwargs_handlers=[unused, patient])
    try:
        place, count = accelerator.device, accelerator.num_processes
        mesh = dist.device_mesh.init_device_mesh(place.type, (count,))
        talk = dist.new_group(backend="gloo", timeout=TIMEOUT)
        yield ProcessGroup(place, accelerator.process_index, count, accelerator, mesh, talk)
    finally:
        accelerator.end_training()
