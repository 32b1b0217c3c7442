"""The processes of a run, one per device, and how a model is distributed over them.

Without `torchrun` there is one process. Replicas of the model (DDP) go through accelerate; its
shards (FSDP2) go through PyTorch's `fully_shard`, which accelerate supports on GPUs only.
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

# The other processes wait while the first one alone encodes, validates and rolls out.
TIMEOUT = timedelta(hours=4)


@dataclass(frozen=True)
class DistributedContext:
    """This process among the processes of a run.

    Every process must call the collective methods: `all_reduce_mean`, `any_process`, `broadcast`,
    `barrier` and `main_first`.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    # `accelerate.Accelerator` and PyTorch's device mesh; None with a single process.
    accelerator: Any = None
    mesh: Any = None
    # A gloo group on the CPU, whose messages do not wait for a device; None with a single process.
    cpu_group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.rank == 0

    def local_slice(self, total: int) -> slice:
        """Return this process's part of a batch of `total` samples.

        Raises:
            ConfigError: The batch cannot be split into equal parts.
        """
        if total % self.world_size:
            raise ConfigError(
                f"a batch of {total} cannot be split into equal parts for {self.world_size} "
                f"processes: choose a --batch-size that is a multiple of "
                f"--gradient-accumulation-steps times {self.world_size}"
            )
        size = total // self.world_size
        return slice(self.rank * size, (self.rank + 1) * size)

    def wrap_ddp(self, module: nn.Module) -> nn.Module:
        """Replicate a module: gradients are averaged over all processes, each has all weights."""
        if self.accelerator is None:
            return module
        replica: nn.Module = self.accelerator.prepare_model(module)
        return replica

    def wrap_fsdp(self, module: nn.Module, *, compute: torch.dtype) -> nn.Module:
        """Shard weights, gradients and optimizer state of a module over the processes (FSDP2).

        Args:
            module: Module with transformer blocks, which are sharded one by one; changed.
            compute: Dtype of the forward and backward pass.
        """
        from torch.distributed.fsdp import (
            MixedPrecisionPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        # Inputs are cast by the training step, which leaves the timesteps in float32.
        policy = MixedPrecisionPolicy(
            param_dtype=None if compute == torch.float32 else compute,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        # FSDP2 gathers the weights of a block for its `forward`; `self_key_value` reads them too.
        blocks = [part for part in module.modules() if isinstance(part, Block)]
        for block in blocks:
            fully_shard(block, mesh=self.mesh, mp_policy=policy)
            register_fsdp_forward_method(block, "self_key_value")
        fully_shard(module, mesh=self.mesh, mp_policy=policy)
        return module

    def accumulate(self, module: nn.Module, *, last: bool) -> Any:
        """Return a context in which gradients add up, exchanged only with the last part of a batch.

        Shards exchange theirs with every part, because no process has room for all gradients.

        Args:
            module: Module from `wrap_ddp` or `wrap_fsdp`.
            last: Whether this is the last part of the batch.
        """
        if last or self.world_size == 1 or is_sharded(module):
            return nullcontext()
        return self.accelerator.no_sync(module)

    def all_reduce_mean(self, numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the means of scalars over all processes, on the device."""
        if self.world_size == 1:
            return dict(numbers)
        # One message for all numbers.
        stacked = torch.stack([x.float() for x in numbers.values()])
        dist.all_reduce(stacked)
        means = (stacked / self.world_size).unbind()
        return dict(zip(numbers, means, strict=True))

    def any_process(self, flag_is_set: bool) -> bool:
        """Return whether a flag is set in any process."""
        if self.world_size == 1:
            return flag_is_set
        # On the CPU, so that the answer does not wait for work queued on a GPU.
        flag = torch.tensor(float(flag_is_set), dtype=torch.float32, device="cpu")
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.cpu_group)
        return bool(flag)

    def broadcast(self, value: T) -> T:
        """Return the first process's value of an object that can be pickled."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.cpu_group)
        return values[0]

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world_size > 1:
            dist.barrier()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the first process run the body of the `with` before the others."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()


def is_sharded(module: nn.Module) -> bool:
    """Return whether the weights of a module are sharded over processes."""
    return any(hasattr(parameter, "to_local") for parameter in module.parameters())


def local_tensor(x: Tensor) -> Tensor:
    """Return this process's shard of a tensor; the tensor itself if it is not sharded."""
    return x.to_local() if hasattr(x, "to_local") else x


def full_tensor(x: Tensor) -> Tensor:
    """Return the whole of a tensor; if it is sharded, every process must call this."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def shard_like(x: Tensor, other: Tensor) -> Tensor:
    """Return local numbers as the shard of a tensor that is sharded as another one is.

    Args:
        x: This process's shard, or a scalar, which is returned as it is.
        other: Tensor to take the sharding from; if it is not sharded, `x` is returned as it is.
    """
    # Step counters of the optimizer are scalars, which every process has.
    if not hasattr(other, "to_local") or x.shape != other.to_local().shape or x.ndim == 0:
        return x
    from torch.distributed.tensor import DTensor

    sharded: DTensor = other  # type: ignore[assignment]  # it has `to_local`
    return DTensor.from_local(
        x, sharded.device_mesh, sharded.placements, shape=sharded.shape, stride=sharded.stride()
    )


@contextmanager
def init_processes(device: str) -> Iterator[DistributedContext]:
    """Join the processes that `torchrun` started; without it, this one is alone.

    Args:
        device: Device to compute on, such as "cuda"; each of several processes takes its own.

    Raises:
        ConfigError: There is no such device.
        MissingExtraError: There are several processes and accelerate is not installed.
    """
    try:
        requested = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"`device` {device!r} is not a device of PyTorch: use cpu or cuda"
        ) from error
    if requested.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"`device` {device!r}: PyTorch finds no CUDA device; use --device cpu, or install a "
            f"CUDA build of PyTorch"
        )

    # `torchrun` sets WORLD_SIZE.
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield DistributedContext(requested)
        return

    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
    except ImportError as error:
        raise MissingExtraError("accelerate", "train") from error

    # With a loss turned off, the weights that only this loss reads get no gradients.
    ddp_options = DistributedDataParallelKwargs(find_unused_parameters=True)
    group_options = InitProcessGroupKwargs(timeout=TIMEOUT)
    accelerator = Accelerator(
        cpu=requested.type == "cpu", kwargs_handlers=[ddp_options, group_options]
    )
    try:
        world_size = accelerator.num_processes
        yield DistributedContext(
            device=accelerator.device,
            rank=accelerator.process_index,
            world_size=world_size,
            accelerator=accelerator,
            mesh=dist.device_mesh.init_device_mesh(accelerator.device.type, (world_size,)),
            cpu_group=dist.new_group(backend="gloo", timeout=TIMEOUT),
        )
    finally:
        accelerator.end_training()
