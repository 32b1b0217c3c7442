"""Loading of policies in every format: this package's, the references' and LeRobot's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from wam_policy.errors import WAMPolicyError, WeightsError
from wam_policy.hub import adapters, checkpoint, weights
from wam_policy.hub.checkpoint import LoadOptions, PolicyParts
from wam_policy.hub.download import is_hub_snapshot
from wam_policy.hub.foreign import identify, lerobot_config
from wam_policy.hub.foreign.contracts import foreign_config
from wam_policy.hub.foreign.identify import ForeignCheckpoint
from wam_policy.hub.request import CheckpointRequest, refuse_release_info
from wam_policy.models.config import FastWAMConfig


def load_policy(request: CheckpointRequest, options: LoadOptions) -> PolicyParts:
    """Load a policy of any format.

    Args:
        request: Checkpoint to load.
        options: How it is loaded.

    Returns:
        The parts of the policy; the frozen encoders are loaded at first use.

    Raises:
        CheckpointError: The checkpoint is missing, unreadable, or only a part of a policy.
        ConfigError: The configuration is invalid.
    """
    path = request.locate(options.download)
    is_other = lerobot_config.is_lerobot(path) or adapters.is_adapter(path)
    if path.is_dir() and not is_other:
        if checkpoint.is_native(path):
            refuse_release_info(path, request)
        return checkpoint.read_checkpoint(path, options)
    if options.verify:
        raise WeightsError(
            f"{path} is a checkpoint of another project, which records no SHA-256: leave out "
            f"`verify`, or compare its hash yourself (wam convert --sha256 …)"
        )
    if adapters.is_adapter(path):
        return _load_adapter(path, options)
    return _load_foreign(path, request, options)


def _load_foreign(path: Path, request: CheckpointRequest, options: LoadOptions) -> PolicyParts:
    """Load a policy of another project; arguments are those of `load_policy`."""
    # Parts, video VAEs and text encoders have to be converted first.
    foreign = read_foreign(path)
    if foreign.kind != "policy":
        command = f"wam convert {path} FOLDER"
        if foreign.kind == "part":
            command += " and then wam train --pretrained-path FOLDER"
        raise WeightsError(
            f"{path} holds no policy but a {foreign.kind} ({foreign.layout}), "
            f"which cannot act; run {command}"
        )

    # Another project's file holds no prompt embeddings; its encoders are on the Hub.
    config, _ = foreign_config(foreign, path, request)
    model = checkpoint.empty_model(config)
    weights.assign_weights(
        model,
        foreign.tensors,
        str(path),
        dtype=options.dtype or getattr(torch, config.dtype),
        device=options.device,
        mmap=options.mmap,
    )
    return checkpoint.assemble(config, model, {}, path.parent, options)


def _load_adapter(path: Path, options: LoadOptions) -> PolicyParts:
    """Load the policy that an adapter was trained on, and merge the adapter into it.

    Args:
        path: Folder of the adapter.
        options: How the base is loaded.

    Raises:
        WeightsError: The base cannot be loaded, or the adapter does not fit it.
    """
    config = adapters.read_adapter_config(path)
    base = str(config.base_model_name_or_path)
    base_request = CheckpointRequest(base, may_be_local=not is_hub_snapshot(path))
    try:
        parts = load_policy(base_request, options)
    except WAMPolicyError as error:
        raise adapters.base_error(path, base, error) from error
    adapters.merge_adapter(path, config, parts.model)

    # A fine-tuning by LeRobot has statistics of its own.
    if (path / checkpoint.CONFIG).is_file() and lerobot_config.is_lerobot(path):
        sizes = parts.config.model
        if not isinstance(sizes, FastWAMConfig):
            raise WeightsError(f"{path} is an adapter of LeRobot's, but {base!r} is no Fast-WAM")
        policy_config, _ = lerobot_config.read_policy_config(path, sizes)
        return replace(parts, config=policy_config)
    return parts


def read_foreign(path: Path) -> ForeignCheckpoint:
    """Read a file or folder of another project; tensors stay memory-mapped where possible.

    Args:
        path: File, LeRobot folder, or folder of raw Wan shards.

    Returns:
        Its content; tensors of a policy or part have this package's names.

    Raises:
        WeightsError: It cannot be read, or its format is unknown.
    """
    if path.is_dir() and lerobot_config.is_lerobot(path):
        return identify.identify(weights.read_weights(path), path)
    return identify.read_foreign_file(path)
