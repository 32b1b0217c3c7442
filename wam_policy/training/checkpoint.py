"""A run's checkpoints: the policy as anyone can load it, and beside it what the run needs to go on as if never stopped."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wam_policy.errors import CheckpointError, ConfigError
from wam_policy.models.registry import Model
from wam_policy.policy import WAMPolicy
from wam_policy.training.distributed import ProcessGroup, is_sharded, local_tensor, shard_like
from wam_policy.utils.io import sync_tree, write_text

CHECKPOINTS, OWN, TENSORS, FACTS = "checkpoints", "training", "state.safetensors", "state.json"
RESUMABLE_OPTIONS = (  # options that may change when a run goes on: they change nothing that is trained
    *("output_dir", "cache", "save_steps", "save_total_limit", "logging_steps", "report_to"),
    *(
        "eval_env",
        "eval_tasks",
        "eval_episodes",
        "device",
        "validation_windows",
        "validation_videos",
    ),
)


@dataclass
class TrainState:
    """What changes while a run trains."""

    model: Model
    ema_model: Model  # the model itself, where nothing is averaged
    optimizer: torch.optim.Optimizer
    loss_module: nn.Module  # computes the model's losses
    processes: ProcessGroup
    frozen: str  # from `frozen_hash`
    export_model: Model  # plain and whole, with the weights that are kept: the averaged ones, where there are such
    step: int = 0  # updates done
    sums: dict[str, float] = field(default_factory=dict)  # of the curve's next row

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is trained, or what of it lies here, by name."""
        named = {f"model.{name}": x for name, x in self.model.named_parameters() if x.requires_grad}
        if self.ema_model is not self.model:
            wanted = {name.removeprefix("model.") for name in named}
            named |= {
                f"averaged.{name}": x
                for name, x in self.ema_model.named_parameters()
                if name in wanted
            }
        for i, numbers in self.optimizer.state_dict()["state"].items():
            named |= {f"optimizer.{i}.{name}": x for name, x in numbers.items()}
        return {name: local_tensor(x.detach()) for name, x in named.items()}

    @property
    def file(self) -> str:
        """Where this process writes that."""
        return f"state_{self.processes.rank:05}.safetensors" if is_sharded(self.model) else TENSORS

    @property
    def spread(self) -> dict[str, Any]:
        """How what is trained is spread: a run that goes on must spread it alike."""
        return {
            "processes": self.processes.world_size if is_sharded(self.model) else 1,
            "frozen_sha256": self.frozen,
        }


def frozen_hash(model: nn.Module) -> str:
    """SHA-256 of what isn't trained: a run that goes on must find it as it was."""
    digest = hashlib.sha256()
    for name, x in model.named_parameters():
        if not x.requires_grad:
            digest.update(name.encode())
            digest.update(x.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_checkpoint(
    out: Path, state: TrainState, policy: WAMPolicy, run_fingerprint: Mapping[str, Any], keep: int
) -> Path:
    """Write a checkpoint, then remove the oldest; a kill or a full disk leaves those that were there.

    Args:
        out: folder of the run.
        state: what is saved.
        policy: of the kept weights.
        run_fingerprint: what the run is: a run that goes on must be the same.
        keep: newest checkpoints that stay.

    Raises:
        CheckpointError: it can't be written.
    """
    target = out / CHECKPOINTS / f"step_{state.step:08}"
    partial = target.with_name(target.name + ".partial")
    first, wait = state.processes.is_main, state.processes.barrier
    try:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
            policy.save_pretrained(partial, dtype=torch.bfloat16)
            (partial / OWN).mkdir()
            own = {"step": state.step, "sums": state.sums, **state.spread, **run_fingerprint}
            write_text(partial / OWN / FACTS, json.dumps(own, indent=2) + "\n")
        wait()
        if first or is_sharded(state.model):
            save_file(
                {name: x.contiguous() for name, x in state.tensors().items()},
                partial / OWN / state.file,
            )
        wait()
        if first:
            sync_tree(partial)
            shutil.rmtree(target, ignore_errors=True)
            partial.replace(target)
        wait()
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        last = latest_checkpoint(out)
        raise CheckpointError(
            f"the checkpoint of step {state.step} can't be written ({error}); "
            f"{'there is none yet' if last is None else f'the last one is {last}'}: make room and start the run again"
        ) from error
    for old in _all(out)[:-keep] if first else ():
        shutil.rmtree(old)
    return target


def remove_partial(out: Path) -> None:
    """Remove what a killed run left half written."""
    for partial in out.glob(f"{CHECKPOINTS}/*.partial"):
        shutil.rmtree(partial)


def _all(out: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(
        path for path in (out / CHECKPOINTS).glob("step_*") if re.fullmatch(r"step_\d+", path.name)
    )


def latest_checkpoint(out: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    found = _all(out)
    return found[-1] if found else None


def _read(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of its run."""
    try:
        own: dict[str, Any] = json.loads((folder / OWN / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} can't be read ({error}); remove it to go on from the one before"
        ) from error
    return own


def check_same_run(folder: Path, now: Mapping[str, Any]) -> None:
    """Refuse to go on from a checkpoint of another run.

    Args:
        folder: from `latest`.
        now: what the run is now, or a part of that.

    Raises:
        ConfigError: the run was another one; what differs is listed.
        CheckpointError: the checkpoint can't be read.
    """
    own = _read(folder)
    differing = _differences({name: own.get(name) for name in now}, dict(now))
    if differing:
        lines = "\n".join(
            f"  {name}: was {was!r}, is {now!r}" for name, (was, now) in differing.items()
        )
        raise ConfigError(
            f"{folder} is of another run:\n{lines}\nuse the same options, or another --output-dir"
        )


def restore_checkpoint(folder: Path, state: TrainState) -> None:
    """Go on from a checkpoint.

    Args:
        folder: from `latest`.
        state: newly made; filled.

    Raises:
        ConfigError: what isn't trained is another.
        CheckpointError: the checkpoint can't be read, or doesn't fit.
    """
    check_same_run(folder, state.spread)
    own = _read(folder)
    try:
        tensors = load_file(folder / OWN / state.file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} can't be read ({error}); remove it to go on from the one before"
        ) from error
    optimizer: dict[int, dict[str, Tensor]] = {}
    trained = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    for name, x in tensors.items():
        if name.startswith("optimizer."):
            _, i, number = name.split(".", 2)
            optimizer.setdefault(int(i), {})[number] = shard_like(x, trained[int(i)])
    _fill(state.model, tensors, "model.", folder)
    if state.ema_model is not state.model:
        _fill(state.ema_model, tensors, "averaged.", folder)
    state.optimizer.load_state_dict(
        {"state": optimizer, "param_groups": state.optimizer.state_dict()["param_groups"]}
    )
    state.step, state.sums = own["step"], own["sums"]


@torch.no_grad()
def _fill(model: nn.Module, tensors: Mapping[str, Tensor], prefix: str, folder: Path) -> None:
    places = dict(model.named_parameters())
    for name, x in tensors.items():
        if name.startswith(prefix):
            place = places.get(name.removeprefix(prefix))
            if place is None or local_tensor(place).shape != x.shape:
                raise CheckpointError(
                    f"{folder}: {name} {list(x.shape)} doesn't fit this run's model"
                )
            local_tensor(place).copy_(x)


def _differences(was: Any, now: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    """Where two trees of JSON differ, but for options that may."""
    if isinstance(was, dict) and isinstance(now, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in sorted((was | now).keys() - set(RESUMABLE_OPTIONS if name == "config" else ())):
            found |= _differences(was.get(key), now.get(key), f"{name}.{key}" if name else key)
        return found
    return {} if was == now else {name: (was, now)}
