"""LoRA adapters of other projects: they are merged into the policy they were trained on, by peft.

Format: `adapter_config.json` and `adapter_model.safetensors`, as peft's `save_pretrained` and
LeRobot's fine-tuning write them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wam_policy.errors import ConfigError, MissingExtraError, WeightsError
from wam_policy.hub import weights
from wam_policy.hub.foreign import key_mapping
from wam_policy.utils import documents
from wam_policy.utils.json_dataclass import from_plain

CONFIG = "adapter_config.json"
STEM = "adapter_model"

# What peft puts in front of the names of the model that it wraps.
_PREFIX = "base_model.model."

_CURE = (
    "merge it into its base first: `model.merge_and_unload()` of peft on the policy it was trained "
    "on, and save the result"
)


@dataclass(frozen=True)
class AdapterConfig:
    """The entries of `adapter_config.json` that are followed."""

    peft_type: str
    base_model_name_or_path: str | None = None
    r: int = 8
    lora_alpha: float = 8.0
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    bias: str = "none"
    rank_pattern: dict[str, Any] | None = None
    alpha_pattern: dict[str, Any] | None = None


def is_adapter(path: Path) -> bool:
    """Return whether a path is a folder with an adapter instead of a model."""
    return (path / CONFIG).is_file() and not (path / "model.safetensors").is_file()


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read what an adapter is, after a check that it can be merged.

    Raises:
        WeightsError: It is no LoRA adapter, has settings that are not supported, or names no base.
    """
    data = documents.read_json_object(folder / CONFIG, WeightsError, _CURE)
    try:
        config = from_plain(AdapterConfig, data, foreign=True)
    except ConfigError as error:
        raise WeightsError(f"{folder / CONFIG}: {error}; {_CURE}") from error

    unsupported = []
    if config.peft_type != "LORA":
        unsupported.append(f"peft_type {config.peft_type!r}")
    for name in ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern"):
        if getattr(config, name):
            unsupported.append(name)
    if config.bias != "none":
        unsupported.append(f"bias {config.bias!r}")
    if unsupported or config.r < 1:
        raise WeightsError(
            f"{folder} is an adapter with {', '.join(unsupported) or f'rank {config.r}'}, which is "
            f"not supported here; {_CURE}"
        )
    if config.base_model_name_or_path is None:
        raise WeightsError(f"{folder} is an adapter that names no base; {_CURE}")
    return config


def base_error(folder: Path, base: str, error: Exception) -> WeightsError:
    """Return the error of an adapter whose base cannot be loaded."""
    return WeightsError(
        f"{folder} is an adapter ({CONFIG}) of {base!r}, which cannot be loaded ({error}); make "
        f"the base available, or {_CURE}"
    )


def merge_adapter(folder: Path, config: AdapterConfig, model: nn.Module) -> None:
    """Merge an adapter into the model that it was trained on.

    Args:
        folder: Folder of the adapter.
        config: What it is.
        model: Model of the base; changed.

    Raises:
        WeightsError: The adapter does not fit the model.
        MissingExtraError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        raise MissingExtraError("peft", "train") from error

    tensors = weights.read_weights(folder, STEM)
    weights.check_finite(tensors.items(), str(folder / STEM))
    bare = {name.removeprefix(_PREFIX): x for name, x in tensors.items()}
    native = key_mapping.policy_to_native(bare)
    adapted = sorted({name.rpartition(".lora_A")[0] for name in native if ".lora_A." in name})
    trained = {name: x for name, x in native.items() if ".lora_" not in name}
    _check_names(folder, adapted, trained, model)

    # peft adds the adapter to exactly the layers that it has weights for.
    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        use_rslora=config.use_rslora,
        target_modules=adapted,
    )
    inject_adapter_in_model(lora, model)
    state = {name: x for name, x in native.items() if ".lora_" in name}
    try:
        report = set_peft_model_state_dict(model, state)
    except (RuntimeError, ValueError, KeyError) as error:
        raise WeightsError(f"{folder} does not fit its base ({error!s:.300}); {_CURE}") from error
    if report.unexpected_keys:
        raise WeightsError(f"{folder} does not fit its base: {report.unexpected_keys[:5]}; {_CURE}")

    # Merge: the weights of the base may be mapped from its file, which must not be written.
    with torch.no_grad():
        for path in adapted:
            layer = model.get_submodule(path)
            assert isinstance(layer, LoraLayer)
            layer.merge(safe_merge=True)
            model.set_submodule(path, layer.get_base_layer())
        parameters = dict(model.named_parameters())
        for name, x in trained.items():
            parameters[name].data = x.to(parameters[name])


def _check_names(
    folder: Path, adapted: list[str], trained: dict[str, Tensor], model: nn.Module
) -> None:
    """Check that an adapter's names and shapes are those of the model's layers."""
    parameters = dict(model.named_parameters())
    missing = [path for path in adapted if f"{path}.weight" not in parameters]
    missing += [
        name
        for name, x in trained.items()
        if name not in parameters or x.shape != parameters[name].shape
    ]
    if missing or not adapted:
        raise WeightsError(
            f"{folder} holds an adapter of layers that its base does not have: "
            f"{(missing or list(trained))[:5]}; {_CURE}"
        )
