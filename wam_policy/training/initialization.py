"""What a training run begins from: another policy's weights, or what `wam convert` made of raw Wan weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wam_policy.checkpoints import resolve_checkpoint
from wam_policy.config import (
    PolicyConfig,
    PromptConfig,
    Source,
)
from wam_policy.errors import CheckpointError
from wam_policy.hub import checkpoint, weights
from wam_policy.hub.download import DownloadOptions, resolve_folder
from wam_policy.models.fast_wam.initialize import action_from_video
from wam_policy.models.fast_wam.model import FastWAM
from wam_policy.models.layers.precision import PRECISIONS
from wam_policy.models.light_wam.model import LightWAM, is_trainable
from wam_policy.models.registry import Model, build_model
from wam_policy.normalize import Normalization

logger = logging.getLogger(__name__)
EMBODIMENT_LAYERS = (  # what another robot needs anew
    "action.action_encoder.",
    "action.head.",
    "expert.output.2.",
    "proprio_encoder.",
)


class PolicyNormalization(NamedTuple):
    """How a policy's numbers are normalised."""

    names: tuple[Sequence[str], Sequence[str]]  # of the state and of the actions
    state: Normalization
    action: Normalization


@dataclass(frozen=True)
class InitWeights:
    """Weights to begin from, in our names, and the sizes of the model they are of."""

    folder: str  # for messages
    root: Path  # of the first part, in which its own codec and text encoder lie
    sizes: dict[str, Any]
    tensors: dict[str, Tensor]
    action_shift: float | None = (
        None  # that the weights were trained with, where they are a Fast-WAM's
    )
    prompt: PromptConfig | None = None  # likewise
    normalization: PolicyNormalization | None = None
    prompts: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # embeddings that they were trained with
    text: Source | None = None  # the text encoder that made those
    policy: PolicyConfig | None = None  # whose weights they are


def read_init_weights(*places: str | Path) -> InitWeights:
    """Read a checkpoint, or parts of one: folders, Hub ids, "embedded:<name>".

    Raises:
        CheckpointError: one isn't there or is neither, two hold the same part or are of different sizes, or the video expert
            is lacking.
    """
    found = [_read(checkpoint_folder(one)) for one in places]
    sizes: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for part in found:
        differing = sorted(
            name for name, size in part.sizes.items() if sizes.get(name, size) != size
        )
        if differing or tensors.keys() & part.tensors.keys():
            raise CheckpointError(
                f"{part.folder} doesn't go with the other parts: {differing or 'they hold the same weights'}"
            )
        sizes, tensors = sizes | part.sizes, tensors | part.tensors
    names = " and ".join(part.folder for part in found)
    if not any(name.startswith("video.") for name in tensors):
        raise CheckpointError(
            f"{names} holds no video expert: convert the raw Wan weights, or a policy, and name it too"
        )
    return replace(found[0], folder=names, sizes=sizes, tensors=tensors)


def checkpoint_folder(one: str | Path) -> Path:
    """The local folder of a checkpoint: a folder, a Hub id, which is downloaded, or "embedded:<name>".

    Raises:
        CheckpointError: it isn't there.
    """
    return resolve_folder(resolve_checkpoint(str(one)), DownloadOptions())


def video_expert_only(start: InitWeights) -> InitWeights:
    """The video expert of weights to begin from, without the rest; prompts stay known."""
    tensors = {name: x for name, x in start.tensors.items() if name.startswith("video.")}
    return replace(start, tensors=tensors, action_shift=None)


def _read(folder: Path) -> InitWeights:
    base, known = folder / checkpoint.BASE, dict[str, Any]()
    if base.is_file():
        sizes = json.loads(base.read_text(encoding="utf-8"))["sizes"]
    else:
        config = checkpoint.read_config(folder)
        sizes = asdict(config.model)
        known = {
            "policy": config,
            "action_shift": config.sampling.action_shift,
            "prompt": config.prompt,
            "text": config.text,
        }
        if config.state is not None:
            names = (config.state.names, config.action.layout.names)
            known["normalization"] = PolicyNormalization(
                names, config.state.normalization, config.action.normalization
            )
        if (folder / f"{checkpoint.PROMPTS}.safetensors").is_file():
            known["prompts"] = weights.read_weights(folder, checkpoint.PROMPTS)
    tensors = checkpoint.checkpoint_tensors(folder, DownloadOptions())
    if sizes.get("lean_steps") is not None:
        raise CheckpointError(
            f"{folder} is a lean checkpoint, which only acts: begin from a fat or slim one"
        )
    plain = {name: tuple(size) if isinstance(size, list) else size for name, size in sizes.items()}
    return InitWeights(str(folder), folder, plain, tensors, **known)


@torch.no_grad()
def load_init_weights(model: nn.Module, start: InitWeights) -> list[str]:
    """Give a new model the weights to begin from, and return the names of those that stay new.

    A Fast-WAM's action expert is made out of the video expert where there is none. Of weights of another family a Light-WAM
    takes the video expert, and the proprio encoder that it was trained with; what else it trains stays new. The layers that
    another robot's numbers go through stay new where they are missing or of another shape; everything else must fit.

    Raises:
        WeightsError: it doesn't.
        CheckpointError: they are a Light-WAM's, the model is a Fast-WAM.
    """
    own, given = model.state_dict(), dict(start.tensors)
    fresh: set[str] = set()
    if isinstance(model, LightWAM):
        if not any(
            name.startswith("expert.") for name in given
        ):  # not a Light-WAM: its video expert, and its proprio encoder
            given = {name: x for name, x in given.items() if name in own}
            fresh = {name for name in own if is_trainable(name) and name not in given}
    elif any(name.startswith("expert.") for name in given):
        raise CheckpointError(
            f"{start.folder} is a Light-WAM's checkpoint: begin `wam train-light` from it, or name a Fast-WAM's"
        )
    elif not any(name.startswith("action.blocks.") for name in given):
        video, action = (
            {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
            for tensors, prefix in ((given, "video."), (own, "action."))
        )
        given |= {f"action.{name}": x for name, x in action_from_video(video, action).items()}
    robot = {
        name
        for name in own
        if name.startswith(EMBODIMENT_LAYERS)
        and (name not in given or given[name].shape != own[name].shape)
    }
    new = [name for name in own if name in robot | fresh]
    dropped = {
        name
        for name in given
        if name in new or (name.startswith(EMBODIMENT_LAYERS) and name not in own)
    }
    given = {name: x.float() for name, x in given.items() if name not in dropped}
    weights.check_fit(given, {name: x for name, x in own.items() if name not in new}, start.folder)
    model.load_state_dict(given, strict=False)
    logger.info("begun from %s%s", start.folder, f"; new: {', '.join(new)}" if new else "")
    return new


TRAINABLE_PREFIXES = {  # of a Fast-WAM that can be trained alone: the beginnings of their names
    "all": ("",),
    "video": ("video.", "proprio_encoder."),
    "action": ("action.", "proprio_encoder."),
    "embodiment": EMBODIMENT_LAYERS,
    "lora": EMBODIMENT_LAYERS,  # and adapters
}


def new_model(policy: PolicyConfig, start: InitWeights | None, part: str = "all") -> Model:
    """The model a run begins with; what isn't trained is frozen: of a Fast-WAM all but a part, of a Light-WAM the trunk."""
    model = build_model(policy.model, PRECISIONS[policy.precision])
    if start is not None:
        load_init_weights(model, start)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            name.startswith(TRAINABLE_PREFIXES[part])
            if isinstance(model, FastWAM)
            else is_trainable(name)
        )
    return model
