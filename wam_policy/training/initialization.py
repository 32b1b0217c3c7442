"""The weights that a run starts from: another policy's, or those that `wam convert` wrote.

See docs/method.md, "Initialisation".
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wam_policy.checkpoints import resolve_checkpoint
from wam_policy.config import PolicyConfig, PromptConfig, Source
from wam_policy.errors import CheckpointError
from wam_policy.hub import checkpoint, weights
from wam_policy.hub.download import DownloadOptions, resolve_folder
from wam_policy.models.fast_wam.initialize import action_from_video
from wam_policy.models.fast_wam.model import FastWAM
from wam_policy.models.layers.precision import PRECISIONS
from wam_policy.models.light_wam.model import LightWAM, is_trainable
from wam_policy.models.registry import Model, build_model
from wam_policy.normalize import Normalization
from wam_policy.utils import documents

logger = logging.getLogger(__name__)

# Prefixes of the layers that read or write the robot's state and actions: they depend on the
# robot, so another robot needs new ones.
EMBODIMENT_LAYERS = (
    "action.action_encoder.",
    "action.head.",
    "expert.output.2.",
    "proprio_encoder.",
)

# Prefixes of the weights that each choice of `trainable` trains in a Fast-WAM. "lora" trains its
# adapters as well.
TRAINABLE_PREFIXES = {
    "all": ("",),
    "video": ("video.", "proprio_encoder."),
    "action": ("action.", "proprio_encoder."),
    "embodiment": EMBODIMENT_LAYERS,
    "lora": EMBODIMENT_LAYERS,
}


class PolicyNormalization(NamedTuple):
    """The normalisation of a policy's state and actions."""

    names: tuple[Sequence[str], Sequence[str]]  # of the state and of the actions
    state: Normalization
    action: Normalization


@dataclass(frozen=True)
class InitWeights:
    """Weights to start from, under this package's names, and what is known about them.

    The fields with a default are unknown for raw weights.
    """

    folder: str  # folders of all parts, for messages
    root: Path  # of the first part, which holds its codec and text encoder
    sizes: dict[str, Any]  # of the model
    tensors: dict[str, Tensor]
    action_shift: float | None = None  # of the flow schedule of a Fast-WAM's actions
    prompt: PromptConfig | None = None
    normalization: PolicyNormalization | None = None
    # Embeddings [n, text_dim] of the prompts that the weights were trained with.
    prompts: Mapping[str, Tensor] = field(default_factory=dict)
    text: Source | None = None  # of the text encoder that made these embeddings
    policy: PolicyConfig | None = None


def read_init_weights(*places: str | Path) -> InitWeights:
    """Read a checkpoint, or several parts of one.

    Args:
        *places: Folders, Hub ids, which are downloaded, or "embedded:<name>".

    Raises:
        CheckpointError: A part does not exist or is no checkpoint, two parts hold the same weights
            or disagree in their sizes, or there is no video expert.
    """
    # Parts may share sizes, but no weights.
    parts = [_read_part(checkpoint_folder(place)) for place in places]
    sizes: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for part in parts:
        differing = []
        for name, size in part.sizes.items():
            if sizes.get(name, size) != size:
                differing.append(name)
        if differing:
            raise CheckpointError(
                f"{part.folder} does not fit the other parts: they differ in {sorted(differing)}"
            )
        if tensors.keys() & part.tensors.keys():
            raise CheckpointError(
                f"{part.folder} does not fit the other parts: they hold the same weights"
            )
        sizes |= part.sizes
        tensors |= part.tensors

    folders = " and ".join(part.folder for part in parts)
    if not any(name.startswith("video.") for name in tensors):
        raise CheckpointError(
            f"{folders} holds no video expert: convert the raw Wan weights, or a policy, and name "
            f"that folder too"
        )
    return replace(parts[0], folder=folders, sizes=sizes, tensors=tensors)


def checkpoint_folder(source: str | Path) -> Path:
    """Return the local folder of a checkpoint.

    Args:
        source: A folder, a Hub id, which is downloaded, or "embedded:<name>".

    Raises:
        CheckpointError: The checkpoint does not exist.
    """
    return resolve_folder(resolve_checkpoint(str(source)), DownloadOptions())


def video_expert_only(start: InitWeights) -> InitWeights:
    """Return only the video expert of the weights; the prompts stay."""
    tensors = {name: x for name, x in start.tensors.items() if name.startswith("video.")}
    return replace(start, tensors=tensors, action_shift=None)


def _read_part(folder: Path) -> InitWeights:
    """Read one folder: a policy, or a part that `wam convert` wrote.

    Raises:
        CheckpointError: It is no checkpoint, or it is a lean one.
    """
    base_config = folder / checkpoint.PARTS_CONFIG
    known: dict[str, Any] = {}
    if base_config.is_file():
        cure = "convert the part again"
        parts = documents.read_json_object(base_config, CheckpointError, cure)
        with documents.explained(base_config, CheckpointError, cure):
            sizes = dict(parts["sizes"])
    else:
        config = checkpoint.read_config(folder)
        sizes = asdict(config.model)
        known = _policy_facts(folder, config)

    # Mapped into memory, not read.
    tensors = checkpoint.checkpoint_tensors(folder, DownloadOptions())
    if sizes.get("lean_steps") is not None:
        raise CheckpointError(
            f"{folder} is a lean checkpoint, which can only act: start from a fat or slim one"
        )

    # JSON has no tuples.
    for name, size in sizes.items():
        if isinstance(size, list):
            sizes[name] = tuple(size)
    return InitWeights(str(folder), folder, sizes, tensors, **known)


def _policy_facts(folder: Path, config: PolicyConfig) -> dict[str, Any]:
    """Return the fields of `InitWeights` that only a whole policy defines."""
    facts: dict[str, Any] = {
        "policy": config,
        "action_shift": config.sampling.action_shift,
        "prompt": config.prompt,
        "text": config.text,
    }
    if config.state is not None:
        facts["normalization"] = PolicyNormalization(
            names=(config.state.names, config.action.layout.names),
            state=config.state.normalization,
            action=config.action.normalization,
        )
    if (folder / f"{checkpoint.PROMPTS}.safetensors").is_file():
        facts["prompts"] = weights.read_weights(folder, checkpoint.PROMPTS)
    return facts


@torch.no_grad()
def load_init_weights(model: nn.Module, start: InitWeights) -> list[str]:
    """Load pretrained weights into a new model.

    A Fast-WAM without a pretrained action expert gets one that is made from the video expert. A
    Light-WAM takes the video expert and the proprio encoder from weights of another family, and
    keeps its other trainable weights. The layers in `EMBODIMENT_LAYERS` keep their new weights
    where the pretrained ones are missing or differ in shape. Everything else must fit.

    Args:
        model: A new model, which is changed.
        start: Weights to load; they stay as they are.

    Returns:
        Names of the weights that stay new.

    Raises:
        WeightsError: The weights do not fit the model.
        CheckpointError: The weights are a Light-WAM's and the model is a Fast-WAM.
    """
    state = model.state_dict()
    untrained: set[str] = set()
    if isinstance(model, LightWAM):
        tensors, untrained = _light_wam_tensors(state, start)
    else:
        tensors = _fast_wam_tensors(state, start)

    # Layers of the robot that do not fit stay new, and their pretrained weights are dropped.
    for name, x in state.items():
        fits = name in tensors and tensors[name].shape == x.shape
        if name.startswith(EMBODIMENT_LAYERS) and not fits:
            untrained.add(name)
    new = [name for name in state if name in untrained]
    loaded = {}
    for name, x in tensors.items():
        unused = name.startswith(EMBODIMENT_LAYERS) and name not in state
        if name not in untrained and not unused:
            loaded[name] = x.float()

    # Everything else must fit exactly.
    expected = {name: x for name, x in state.items() if name not in untrained}
    weights.check_fit(loaded, expected, start.folder)
    model.load_state_dict(loaded, strict=False)
    names = f"; new: {', '.join(new)}" if new else ""
    logger.info("started from %s%s", start.folder, names)
    return new


def _light_wam_tensors(
    state: Mapping[str, Tensor], start: InitWeights
) -> tuple[dict[str, Tensor], set[str]]:
    """Return the weights that a Light-WAM takes, and the names of those that stay new."""
    if _is_light_wam(start):
        return dict(start.tensors), set()

    # Weights of another family: its video expert and, if it has one, its proprio encoder.
    tensors = {name: x for name, x in start.tensors.items() if name in state}
    new = {name for name in state if is_trainable(name) and name not in tensors}
    return tensors, new


def _fast_wam_tensors(state: Mapping[str, Tensor], start: InitWeights) -> dict[str, Tensor]:
    """Return the weights that a Fast-WAM takes, its action expert included."""
    if _is_light_wam(start):
        raise CheckpointError(
            f"{start.folder} is a Light-WAM's checkpoint: start `wam train-light` from it, or name "
            f"the checkpoint of a Fast-WAM"
        )
    tensors = dict(start.tensors)
    if any(name.startswith("action.blocks.") for name in tensors):
        return tensors

    # Without an action expert, make one by shrinking the video expert to its widths.
    video = _subtree(tensors, "video.")
    action = _subtree(state, "action.")
    for name, x in action_from_video(video, action).items():
        tensors[f"action.{name}"] = x
    return tensors


def _is_light_wam(start: InitWeights) -> bool:
    return any(name.startswith("expert.") for name in start.tensors)


def _subtree(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors under a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def new_model(policy: PolicyConfig, start: InitWeights | None, part: str = "all") -> Model:
    """Build the model of a run, with the weights that are not trained frozen.

    Args:
        policy: Contract of the new policy.
        start: Weights that the run starts from; None: new ones.
        part: Part of a Fast-WAM to train, a key of `TRAINABLE_PREFIXES`. A Light-WAM always trains
            everything but its video expert's backbone.

    Raises:
        WeightsError: The weights do not fit the model.
        CheckpointError: The weights are a Light-WAM's and the model is a Fast-WAM.
    """
    model = build_model(policy.model, PRECISIONS[policy.precision])
    if start is not None:
        load_init_weights(model, start)
    for name, parameter in model.named_parameters():
        if isinstance(model, FastWAM):
            trained = name.startswith(TRAINABLE_PREFIXES[part])
        else:
            trained = is_trainable(name)
        parameter.requires_grad_(trained)
    return model
