"""The checkpoints of a run: the policy, and beside it the state that a bit-exact resume needs.

A checkpoint `checkpoints/step_<step>` is a policy folder with a `training/` folder:

    training/state.json             step, sums of the curve's next row, the run's fingerprint
    training/state.safetensors      trained weights, their average, optimizer state
    training/state_<rank>.safetensors   the same as shards, with FSDP
"""

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
from wam_policy.training.distributed import DistributedContext, is_sharded, local_tensor, shard_like
from wam_policy.utils import documents
from wam_policy.utils.io import sync_tree, write_text
from wam_policy.utils.renamed_options import RENAMED_OPTIONS

CHECKPOINTS = "checkpoints"  # in the folder of a run
STATE_DIR = "training"  # in a checkpoint
TENSORS = "state.safetensors"
FACTS = "state.json"

# Options that may change when a run is resumed, because they do not affect what is trained.
RESUMABLE_OPTIONS = (
    "output_dir",
    "cache",
    "save_steps",
    "save_total_limit",
    "logging_steps",
    "report_to",
    "eval_env",
    "eval_tasks",
    "eval_episodes",
    "device",
    "validation_windows",
    "validation_videos",
)


@dataclass
class TrainState:
    """Everything that changes while a run trains."""

    model: Model
    ema_model: Model  # with averaged weights; `model` itself if there is no average
    optimizer: torch.optim.Optimizer
    loss_module: nn.Module  # computes the losses of `model`
    processes: DistributedContext
    frozen_sha256: str  # from `frozen_hash`
    # Plain, unsharded and without adapters, with the averaged weights if there are such.
    export_model: Model
    step: int = 0  # number of updates made
    sums: dict[str, float] = field(default_factory=dict)  # of the curve's next row

    def tensors(self) -> dict[str, Tensor]:
        """Return the trained weights, their average and the optimizer state, by name.

        With FSDP these are the shards of this process.
        """
        # The frozen weights come from the pretrained policy when a run is resumed.
        named: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                named[f"model.{name}"] = parameter
        if self.ema_model is not self.model:
            for name, parameter in self.ema_model.named_parameters():
                if f"model.{name}" in named:
                    named[f"averaged.{name}"] = parameter

        # Parameters are numbered in the order of the optimizer's groups.
        for i, values in self.optimizer.state_dict()["state"].items():
            for name, x in values.items():
                named[f"optimizer.{i}.{name}"] = x
        return {name: local_tensor(x.detach()) for name, x in named.items()}

    @property
    def file(self) -> str:
        """The file of a checkpoint that holds this process's tensors."""
        if is_sharded(self.model):
            return f"state_{self.processes.rank:05}.safetensors"
        return TENSORS

    @property
    def resume_fingerprint(self) -> dict[str, Any]:
        """The sharding and the frozen weights, which must not change when a run is resumed."""
        return {
            "processes": self.processes.world_size if is_sharded(self.model) else 1,
            "frozen_sha256": self.frozen_sha256,
        }


def frozen_hash(model: nn.Module) -> str:
    """Return the SHA-256 of the frozen weights, which a checkpoint does not store."""
    digest = hashlib.sha256()
    for name, x in model.named_parameters():
        if not x.requires_grad:
            # As bytes, because numpy has no bfloat16.
            content = x.detach().cpu().contiguous().view(torch.uint8).numpy()
            digest.update(name.encode())
            digest.update(content.data)
    return digest.hexdigest()


def save_checkpoint(
    out: Path,
    state: TrainState,
    policy: WAMPolicy,
    run_fingerprint: Mapping[str, Any],
    save_total_limit: int,
) -> Path:
    """Write a checkpoint, then remove the oldest ones.

    Every process must call this. A kill or a full disk leaves the earlier checkpoints intact.

    Args:
        out: Folder of the run.
        state: State to save.
        policy: Policy with the exported model.
        run_fingerprint: Options and hashes that must be the same when the run is resumed.
        save_total_limit: Number of newest checkpoints to keep.

    Returns:
        Folder of the checkpoint.

    Raises:
        CheckpointError: The checkpoint cannot be written.
    """
    target = out / CHECKPOINTS / f"step_{state.step:08}"
    partial = target.with_name(target.name + ".partial")
    is_main = state.processes.is_main
    try:
        if is_main:
            _write_policy(partial, state, policy, run_fingerprint)
        state.processes.barrier()

        # Of replicated weights one process writes all, of sharded ones each writes its shards.
        if is_main or is_sharded(state.model):
            tensors = {name: x.contiguous() for name, x in state.tensors().items()}
            save_file(tensors, partial / STATE_DIR / state.file)
        state.processes.barrier()

        # The folder gets its final name only when it is complete and on the disk.
        if is_main:
            sync_tree(partial)
            shutil.rmtree(target, ignore_errors=True)
            partial.replace(target)
        state.processes.barrier()
    except (OSError, SafetensorError) as error:
        # Make room, so that the user can resume from the checkpoint before.
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(_write_error(out, state.step, error)) from error

    # Old checkpoints go only after the new one is in place.
    if is_main:
        for checkpoint in _complete_checkpoints(out)[:-save_total_limit]:
            shutil.rmtree(checkpoint)
    return target


def _write_policy(
    partial: Path, state: TrainState, policy: WAMPolicy, run_fingerprint: Mapping[str, Any]
) -> None:
    """Write the parts of a checkpoint that only the main process writes."""
    shutil.rmtree(partial, ignore_errors=True)
    policy.save_pretrained(partial, dtype=torch.bfloat16)
    (partial / STATE_DIR).mkdir()
    facts = {"step": state.step, "sums": state.sums, **state.resume_fingerprint, **run_fingerprint}
    write_text(partial / STATE_DIR / FACTS, json.dumps(facts, indent=2) + "\n")


def _write_error(out: Path, step: int, error: Exception) -> str:
    """Return the message for a checkpoint that could not be written."""
    latest = latest_checkpoint(out)
    remaining = f"the latest one is {latest}"
    if latest is None:
        remaining = "there is none yet"
    return (
        f"cannot write the checkpoint of step {step} ({error}); {remaining}: free some disk space "
        f"and start the run again"
    )


def remove_partial(out: Path) -> None:
    """Remove the incomplete checkpoints of a killed run from its folder."""
    for partial in out.glob(f"{CHECKPOINTS}/*.partial"):
        shutil.rmtree(partial)


def _complete_checkpoints(out: Path) -> list[Path]:
    """Return the folders of the complete checkpoints of a run, oldest first."""
    folders = (out / CHECKPOINTS).glob("step_*")
    return sorted(path for path in folders if re.fullmatch(r"step_\d+", path.name))


def latest_checkpoint(out: Path) -> Path | None:
    """Return the newest complete checkpoint in the folder of a run; None if there is none."""
    checkpoints = _complete_checkpoints(out)
    return checkpoints[-1] if checkpoints else None


def _read_facts(folder: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's `state.json`."""
    cure = f"remove {folder} to resume from the checkpoint before it"
    return documents.read_json_object(folder / STATE_DIR / FACTS, CheckpointError, cure)


def _read_error(folder: Path, error: Exception) -> CheckpointError:
    """Return the error for a checkpoint that cannot be read."""
    return CheckpointError(
        f"{folder} cannot be read ({error}); remove it to resume from the checkpoint before it"
    )


def check_same_run(folder: Path, now: Mapping[str, Any]) -> None:
    """Check that a checkpoint is of the run that is about to resume from it.

    Args:
        folder: Checkpoint, from `latest_checkpoint`.
        now: Fingerprint of the run, or a part of it.

    Raises:
        ConfigError: The checkpoint is of another run, or an earlier version wrote it; the message
            lists the differences.
        CheckpointError: The checkpoint cannot be read.
    """
    stored = _read_facts(folder)
    _check_option_names(folder, stored.get("config", {}))

    # A caller may check only a part of the fingerprint.
    compared = {name: stored.get(name) for name in now}
    differences = _differences(compared, dict(now))
    if differences:
        rows = []
        for name, (before, after) in differences.items():
            rows.append(f"  {name}: was {before!r}, is {after!r}")
        lines = "\n".join(rows)
        raise ConfigError(
            f"{folder} is of another run:\n{lines}\nuse the same options, or another --output-dir"
        )


def _check_option_names(folder: Path, config: Mapping[str, Any]) -> None:
    """Check that a stored config does not use the option names of an earlier version."""
    renamed = []
    for old, new in RENAMED_OPTIONS.items():
        # "optimizer.clip" is the option "clip" of the section "optimizer".
        section, _, option = old.rpartition(".")
        options = config.get(section, {}) if section else config
        if option in options:
            renamed.append(f"`{old}` is now `{new}`")
    if renamed:
        raise ConfigError(
            f"{folder} was begun by an earlier version of wam-policy, under other option names "
            f"({', '.join(renamed[:3])}); continue the run with that version, or begin anew in "
            f"another --output-dir"
        )


def restore_checkpoint(folder: Path, state: TrainState) -> None:
    """Load a checkpoint into the state of a run.

    Args:
        folder: Checkpoint, from `latest_checkpoint`.
        state: State of the run, newly built; changed.

    Raises:
        ConfigError: The frozen weights, or the number of shards, are not those of the checkpoint.
        CheckpointError: The checkpoint cannot be read, or does not fit the model.
    """
    check_same_run(folder, state.resume_fingerprint)
    facts = _read_facts(folder)
    try:
        tensors = load_file(folder / STATE_DIR / state.file, device="cpu")
    except (OSError, SafetensorError) as error:
        raise _read_error(folder, error) from error

    # Weights are copied in place: the optimizer and the compiled blocks refer to them.
    _copy_weights(state.model, tensors, "model.", folder)
    if state.ema_model is not state.model:
        _copy_weights(state.ema_model, tensors, "averaged.", folder)

    # Options of the optimizer come from the config, its state from the checkpoint.
    optimizer_state = _optimizer_state(tensors, state.optimizer)
    param_groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": optimizer_state, "param_groups": param_groups})
    state.step = facts["step"]
    state.sums = facts["sums"]


def _optimizer_state(
    tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[int, dict[str, Tensor]]:
    """Return the optimizer state of a checkpoint, by parameter number, sharded as the weights."""
    parameters: list[Tensor] = []
    for group in optimizer.param_groups:
        parameters.extend(group["params"])

    # Names are `optimizer.<parameter number>.<name>`.
    state: dict[int, dict[str, Tensor]] = {}
    for key, x in tensors.items():
        if key.startswith("optimizer."):
            _, number, name = key.split(".", 2)
            i = int(number)
            state.setdefault(i, {})[name] = shard_like(x, parameters[i])
    return state


@torch.no_grad()
def _copy_weights(
    model: nn.Module, tensors: Mapping[str, Tensor], prefix: str, folder: Path
) -> None:
    """Copy the tensors under a prefix into the parameters of a model."""
    parameters = dict(model.named_parameters())
    for name, x in tensors.items():
        if not name.startswith(prefix):
            continue
        parameter = parameters.get(name.removeprefix(prefix))
        if parameter is None or local_tensor(parameter).shape != x.shape:
            raise CheckpointError(
                f"{folder}: {name} of shape {list(x.shape)} does not fit the model of this run"
            )
        local_tensor(parameter).copy_(x)


def _differences(before: Any, after: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Return where two JSON trees differ, by dotted path, except in `RESUMABLE_OPTIONS`."""
    if not isinstance(before, dict) or not isinstance(after, dict):
        return {} if before == after else {path: (before, after)}

    keys = before.keys() | after.keys()
    if path == "config":
        keys -= set(RESUMABLE_OPTIONS)
    differences: dict[str, tuple[Any, Any]] = {}
    for key in sorted(keys):
        key_path = f"{path}.{key}" if path else key
        differences |= _differences(before.get(key), after.get(key), key_path)
    return differences
