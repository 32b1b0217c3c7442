"""What a training step of a released size needs on each of 1, 8 and 64 devices: counted, by arithmetic and by running it.

    python benchmarks/memory_plan.py

The real step (bfloat16 passes, float32 weights, gradients and AdamW's two moments, everything cut over the processes) runs on
tensors that hold no numbers, in one process of a group that is only pretended; PyTorch's own tracker counts what is alive at
the worst moment. They are CUDA tensors, whether there is such a device or not (`fake_cuda.py`).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from fake_cuda import environment, pretend
from random_policy import full
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from wam_policy.config import Family
from wam_policy.models.fast_wam.loss import Batch, TrainingNoise
from wam_policy.models.fast_wam.model import FastWAM
from wam_policy.models.layers.text_padding import slots_for
from wam_policy.models.light_wam.loss import LightTrainingNoise
from wam_policy.models.light_wam.model import is_trainable
from wam_policy.models.registry import build_model
from wam_policy.profiling.fake_cuda import cuda_attention
from wam_policy.training.compile import compile_training
from wam_policy.training.config import LightTrainConfig, TrainConfig
from wam_policy.training.distributed import ProcessGroup
from wam_policy.training.train_step import LossModule

GIB = 2**30
TOKENS = 40  # of a prompt
CUDA = torch.device("cuda", 0)


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """The plan."""

    family: Family = "fast_wam"
    processes: tuple[int, ...] = (1, 8, 64)
    batch: int = 16
    """Samples per device and pass; the papers' is 16."""
    row: tuple[int, bool] | None = None
    """Used by the plan itself: one row, in this process."""


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without numbers."""
    return torch.empty(shape, dtype=dtype, device=CUDA)


def inputs(model: Any, b: int) -> tuple[Batch, Any]:
    """LIBERO's shapes."""
    config, fast = model.config, isinstance(model, FastWAM)
    side, rows = (14 if fast else 28), slots_for(TOKENS, 128, proprio=True) - 1
    latents, action = (
        empty(b, config.latent_channels, 3, side, 2 * side),
        empty(b, 32, config.action_dim),
    )
    flags, u = empty(b, 32, dtype=torch.bool), empty(b, dtype=torch.float32)
    context = empty(b, rows, config.text_dim)
    batch = Batch(
        latents, context, action, empty(b, config.proprio_dim), flags, flags[:, :2], empty(b, rows)
    )
    if fast:
        return batch, TrainingNoise(torch.empty_like(latents), u, torch.empty_like(action), u)
    factor = config.video_pool
    return batch, LightTrainingNoise(
        u, empty(b, config.latent_channels, 3, side // factor, 2 * side // factor)
    )


def row(config: PlanConfig, processes: int, checkpointing: bool) -> str:
    """One line of the plan."""
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.testing._internal.distributed.fake_pg import FakeStore

    pretend()
    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    mesh = dist.device_mesh.init_device_mesh("cuda", (processes,))
    paths: dict[str, Any] = {
        "dataset": ("",),
        "codec": Path(),
        "output_dir": Path(),
        "compute_dtype": "bfloat16",
    }
    run: Any = (
        TrainConfig(**paths)
        if config.family == "fast_wam"
        else LightTrainConfig(**paths, pretrained_path=Path())
    )
    with torch.device("meta"):
        model = build_model(full(config.family).model)
    sizes = {name: x.shape for name, x in model.state_dict().items()}
    with FakeTensorMode(allow_non_fake_inputs=True), cuda_attention():
        model.load_state_dict(
            {name: empty(*size, dtype=torch.float32) for name, size in sizes.items()}, assign=True
        )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(isinstance(model, FastWAM) or is_trainable(name))
        compile_training(model, backend=None, checkpointing=checkpointing)
        learned = sum(x.numel() for x in model.parameters() if x.requires_grad)
        every = sum(x.numel() for x in model.parameters())
        module = ProcessGroup(CUDA, 0, processes, None, mesh).wrap_fsdp(
            LossModule(run, model), compute=torch.bfloat16
        )
        tracker = FSDPMemTracker(module)
        with tracker:
            module(*inputs(model, config.batch)).total.backward()
        peak = tracker.get_tracker_snapshot("peak")[CUDA]
    found = {
        kind.value if hasattr(kind, "value") else str(kind): size / GIB
        for kind, size in peak.items()
    }
    moments = 8 * learned / processes / GIB
    plan = (4 * every + 4 * learned) / processes / GIB
    copies = (
        2 * every / GIB if processes == 1 else 0.0
    )  # alone, all weights are cast for a pass at once (`step.Narrowed`)
    total = found["Total"] + moments + copies
    passes = found["Total"] - found["Sharded Param"] - found["Sharded Grad"] + copies
    return (
        f"| {processes} | {config.batch * processes} | {'anew' if checkpointing else 'kept'} | {plan + moments:.1f} | "
        f"{passes:.1f} | **{total:.1f}** |"
    )


def main(config: PlanConfig) -> None:
    """Print the plan, or one row of it."""
    if config.row is not None:
        print(row(config, *config.row))
        return
    print(
        "| devices | samples a step | inside of blocks | weights, gradients, moments | a pass beside them | GiB a device |"
    )
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        env = environment(Path(folder))
        for processes in config.processes:
            for checkpointing in (False, True):
                options = [
                    f"--family={config.family}",
                    f"--batch={config.batch}",
                    "--row",
                    str(processes),
                    str(checkpointing),
                ]
                subprocess.run([sys.executable, __file__, *options], check=True, env=env)


if __name__ == "__main__":
    main(tyro.cli(PlanConfig, description=__doc__))
