"""Configurations of LeRobot's `fastwam` checkpoints.

They come from `config.json` and from the files of the pre- and postprocessor, which
`src/lerobot/processor/` in https://github.com/huggingface/lerobot writes. See docs/method.md, "Data
and normalisation" and "Checkpoint formats".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wam_policy.config import (
    ActionConfig,
    CameraConfig,
    PolicyConfig,
    PromptConfig,
    SamplingConfig,
    Source,
    StateConfig,
    VideoConfig,
)
from wam_policy.contract import ActionLayout, Gripper
from wam_policy.errors import CheckpointError, ConfigError, WeightsError
from wam_policy.hub.foreign.lerobot_processor import ProcessorStatistics, explained, read_json
from wam_policy.models.config import FastWAMConfig
from wam_policy.presets import PRESETS, WAN, Preset

# Names of LeRobot's features; a camera's follows its prefix.
CAMERA = "observation.images."
STATE = "observation.state"
ACTION = "action"

TOKENIZER = "google/umt5-xxl"

# Names of processor steps.
RENAME = "rename_observations_processor"
TOGGLE = "fastwam_action_toggle_processor"

# Settings that change what a policy does, with the only value that this package supports.
SUPPORTED_VALUES = {
    "n_obs_steps": 1,
    "use_relative_actions": False,
    "text_cfg_scale": 1.0,
}

# A gripper whose smallest number in the data is above this has 0 for closed, not -1 for open.
_SIGNED_GRIPPER_LIMIT = -0.5


def is_lerobot(folder: Path) -> bool:
    """Return whether a folder is a Fast-WAM in LeRobot's format.

    Raises:
        CheckpointError: The folder is another policy of LeRobot's.
    """
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    if "format_version" in config or "type" not in config:
        return False
    if config["type"] != "fastwam":
        raise CheckpointError(
            f"{folder} is a LeRobot policy of type {config['type']!r}; this package reads 'fastwam'"
        )
    return True


def head_dim(folder: Path) -> int:
    """Return the width of an attention head, which the weights do not determine."""
    path = folder / "config.json"
    config = read_json(path)
    with explained(path):
        expert = config.get("action_dit_config") or {}
        return int(expert.get("attn_head_dim", 128))


def read_policy_config(folder: Path, sizes: FastWAMConfig) -> tuple[PolicyConfig, dict[str, str]]:
    """Return the configuration of a policy in LeRobot's format.

    Args:
        folder: Folder of the checkpoint.
        sizes: Configuration of its model.

    Returns:
        The configuration, and a description of where each part of it came from.

    Raises:
        CheckpointError: Processor files or statistics are missing, or settings are not supported.
        ConfigError: Entries are invalid.
        WeightsError: The sizes contradict the weights.
    """
    # Refuse settings that would change what the policy does.
    config = read_json(folder / "config.json")
    for name, supported in SUPPORTED_VALUES.items():
        if config.get(name, supported) != supported:
            raise CheckpointError(
                f"{folder}: `{name}` is {config[name]!r}, "
                f"but this package supports only {supported!r}"
            )
    for name, dim in (("action_dim", sizes.action_dim), ("proprio_dim", sizes.proprio_dim)):
        if config.get(name, dim) != dim:
            raise WeightsError(
                f"{folder}: `{name}` is {config[name]!r}, "
                f"the weights have {dim or 'no such part'}: "
                f"they are partial, or of another policy"
            )

    preprocessor = ProcessorStatistics(folder, "policy_preprocessor", "normalizer_processor")
    postprocessor = ProcessorStatistics(folder, "policy_postprocessor", "unnormalizer_processor")
    with explained(folder / "config.json"):
        cameras = _cameras(config, sizes)
        origin = _origin(config, cameras, preprocessor, postprocessor)
        return _policy_config(config, sizes, cameras, preprocessor, postprocessor), origin


def _origin(
    config: Mapping[str, Any],
    cameras: CameraConfig,
    preprocessor: ProcessorStatistics,
    postprocessor: ProcessorStatistics,
) -> dict[str, str]:
    """Describe where each part of a configuration came from, and what differs from LeRobot.

    Args:
        config: Content of `config.json`.
        cameras: Cameras of the policy.
        preprocessor: Statistics of the preprocessor.
        postprocessor: Statistics of the postprocessor.

    Raises:
        CheckpointError: The preprocessor swaps cameras, or scales pixels in an unknown way.
    """
    origin = {
        "contract": "`config.json`",
        "statistics": f"`{preprocessor.path.name}`, `{postprocessor.path.name}` and their tensors",
    }
    if cameras.layout == "t":
        names = ", ".join(cameras.names)
        origin["cameras"] = f"{names}, composed here; the checkpoint takes them as one picture"

    # LeRobot renames an env's cameras to the policy's; here the policy's names count.
    renamed = preprocessor.steps.get(RENAME, {}).get("rename_map")
    if renamed:
        swapped = sorted(set(renamed) & set(config["input_features"]))
        if swapped:
            raise CheckpointError(
                f"{preprocessor.path} renames {swapped}, which are the policy's own names: "
                f"cameras would be swapped"
            )
        names = ", ".join(map(repr, renamed))
        origin["names"] = f"those of `config.json`; LeRobot renamed {names}"

    if _normalized_twice(preprocessor, config["input_features"]):
        origin["pixels"] = (
            "scaled to [-1, 1] once: the preprocessor's mean and deviation of 0.5 "
            "would do it a second time"
        )

    # The frozen encoders are always those of Wan's repository.
    tokenizer = config.get("tokenizer_model_id", TOKENIZER)
    if tokenizer != TOKENIZER:
        origin["tokenizer"] = f"that of `{WAN}`; the checkpoint names {tokenizer!r}"
    encoder = config.get("text_encoder_model_id", WAN)
    if encoder != WAN:
        origin["text encoder"] = f"`{WAN}`; the checkpoint names {encoder!r}"
    return origin


def _policy_config(
    config: Mapping[str, Any],
    sizes: FastWAMConfig,
    cameras: CameraConfig,
    preprocessor: ProcessorStatistics,
    postprocessor: ProcessorStatistics,
) -> PolicyConfig:
    """Return the configuration of a policy; missing entries have LeRobot's defaults.

    Args:
        config: Content of `config.json`.
        sizes: Configuration of the model.
        cameras: Cameras of the policy.
        preprocessor: Statistics of the preprocessor.
        postprocessor: Statistics of the postprocessor.
    """
    stride = config.get("action_video_freq_ratio", 4)
    horizon = config.get("action_horizon", 32)
    sampling = _sampling(config)
    state = None
    if sizes.proprio_dim is not None:
        normalization = preprocessor.normalization("STATE", STATE)
        state = StateConfig(names=_state_names(sizes), normalization=normalization)

    layout = _action_layout(config, sizes, postprocessor)
    frames = (config.get("num_video_frames", 33) - 1) // stride + 1
    action = ActionConfig(
        layout=layout,
        normalization=postprocessor.normalization("ACTION", ACTION),
        horizon=horizon,
        replan=config.get("n_action_steps", horizon),
    )
    prompt = PromptConfig(
        template=config["prompt_template"],
        token_length=config.get("tokenizer_max_len", 128),
        clean=False,
    )
    return PolicyConfig(
        model=sizes,
        cameras=cameras,
        video=VideoConfig(frames=frames, stride=stride),
        state=state,
        action=action,
        prompt=prompt,
        sampling=sampling,
        vae=Source(repo=WAN, subfolder="vae"),
        text=Source(repo=WAN),
        dtype=config.get("torch_dtype", "bfloat16").removeprefix("torch."),
        precision="reference",
    )


def _sampling(config: Mapping[str, Any]) -> SamplingConfig:
    """Return the sampling configuration; a seed of None means new noise at every call."""
    seed = config.get("inference_seed", 42)
    return SamplingConfig(
        steps=config.get("num_inference_steps", 10),
        video_shift=_shift(config, "video"),
        action_shift=_shift(config, "action"),
        seed=42 if seed is None else seed,
        noise="fresh" if seed is None else "fixed",
    )


def _shift(config: Mapping[str, Any], expert: str) -> Any:
    """Return the shift of an expert's schedule: the common one, else the expert's own."""
    common = config.get("sigma_shift")
    return common or config.get(f"{expert}_scheduler", {}).get("infer_shift", 5.0)


def _cameras(config: Mapping[str, Any], sizes: FastWAMConfig) -> CameraConfig:
    """Return the cameras of a policy.

    They stand side by side, in the order of their names. A single image of the size of a preset's T
    layout is composed of the preset's three cameras.

    Args:
        config: Content of `config.json`.
        sizes: Configuration of the model.

    Raises:
        ConfigError: There is no camera, or the image cannot be divided among them.
    """
    features = [name for name in config["input_features"] if name.startswith(CAMERA)]
    names = sorted(name.removeprefix(CAMERA) for name in features)
    height, width = config["image_size"]

    # One image may hold all cameras of a preset.
    preset = _preset(sizes)
    if preset is not None and len(names) == 1 and preset.cameras.layout == "t":
        canvas = (3 * preset.cameras.height, 2 * preset.cameras.width)
        if (height, width) == canvas:
            return preset.cameras

    if not names:
        raise ConfigError(
            f"`input_features` names no camera: expected at least one that begins with {CAMERA!r}"
        )
    if width % len(names):
        raise ConfigError(
            f"an image {width} wide cannot hold {len(names)} cameras of equal width: {names}"
        )
    return CameraConfig(
        names=tuple(names),
        height=height,
        width=width // len(names),
        resize="stretch",
        pixels="float",
    )


def _preset(sizes: FastWAMConfig) -> Preset | None:
    """Return the preset whose state and actions have the model's sizes; None if there is none."""
    for preset in PRESETS.values():
        if (len(preset.state_names), preset.layout.dim) == (sizes.proprio_dim, sizes.action_dim):
            return preset
    return None


def _normalized_twice(preprocessor: ProcessorStatistics, features: Mapping[str, Any]) -> bool:
    """Return whether the preprocessor scales pixels to [-1, 1], as the model does itself.

    Args:
        preprocessor: Statistics of the preprocessor.
        features: `input_features` of `config.json`.

    Raises:
        CheckpointError: The preprocessor scales pixels in another way.
    """
    if preprocessor.mode("VISUAL") == "identity":
        return False
    for camera in features:
        if not camera.startswith(CAMERA):
            continue
        normalization = preprocessor.normalization("VISUAL", camera)
        statistics = normalization.statistics
        are_halves = all(np.allclose(values, 0.5) for values in statistics.values())
        if normalization.mode != "z_score" or not are_halves:
            raise CheckpointError(
                f"{preprocessor.path} normalises the images of {camera!r} by "
                f"{normalization.mode}, {statistics}, but Fast-WAM scales pixels to [-1, 1] "
                f"itself; if this policy was trained so, set VISUAL to IDENTITY in its norm_map"
            )
    return True


def _state_names(sizes: FastWAMConfig) -> tuple[str, ...]:
    """Return the names of the state's entries: those of the matching preset, or numbered ones."""
    preset = _preset(sizes)
    if preset is not None:
        return preset.state_names
    return tuple(f"state_{i}" for i in range(sizes.proprio_dim or 0))


def _action_layout(
    config: Mapping[str, Any], sizes: FastWAMConfig, postprocessor: ProcessorStatistics
) -> ActionLayout:
    """Return the meaning of the actions: that of the matching preset, or the config's names.

    Args:
        config: Content of `config.json`.
        sizes: Configuration of the model.
        postprocessor: Statistics of the postprocessor.

    Raises:
        ConfigError: Several grippers are toggled.
        CheckpointError: The gripper's statistics contradict its convention.
    """
    toggled = _toggled_index(config, sizes, postprocessor)
    preset = _preset(sizes)
    if preset is not None:
        layout = preset.layout
        gripper = layout.gripper
        if gripper is not None and toggled is None:
            gripper = _untoggled_gripper(gripper.index, postprocessor)
        return ActionLayout(names=layout.names, control=layout.control, gripper=gripper)

    names = config.get("action_feature_names") or [f"action_{i}" for i in range(sizes.action_dim)]
    gripper = None
    if toggled is not None:
        gripper = Gripper(index=toggled, open=1.0, closed=0.0, binary=True)
    return ActionLayout(names=tuple(names), control="unspecified", gripper=gripper)


def _toggled_index(
    config: Mapping[str, Any], sizes: FastWAMConfig, postprocessor: ProcessorStatistics
) -> int | None:
    """Return the index of the gripper that LeRobot toggles; None for none.

    Toggling maps 1 (open) and 0 (closed) to LIBERO's -1 and 1. The step of the saved postprocessor
    takes precedence over the config.

    Raises:
        ConfigError: Several grippers are toggled.
    """
    from_config = config.get("toggle_action_dimensions")
    dimensions = postprocessor.steps.get(TOGGLE, {}).get("toggle_dimensions", from_config) or []
    indices = [index % sizes.action_dim for index in dimensions]
    if len(indices) > 1:
        raise ConfigError(
            f"`toggle_action_dimensions` names several grippers, {indices}; "
            f"this package supports one"
        )
    return indices[0] if indices else None


def _untoggled_gripper(index: int, postprocessor: ProcessorStatistics) -> Gripper:
    """Return LIBERO's own gripper, open at -1 and closed at 1, which needs no toggling.

    Args:
        index: Index of the gripper in an action.
        postprocessor: Statistics of the postprocessor.

    Raises:
        CheckpointError: The gripper's numbers are those of a gripper that needs toggling.
    """
    statistics = postprocessor.normalization("ACTION", ACTION).statistics
    if "min" in statistics and statistics["min"][index] > _SIGNED_GRIPPER_LIMIT:
        raise CheckpointError(
            f"{postprocessor.path}: the gripper's numbers begin at "
            f"{statistics['min'][index]:g}, so 0 is closed, but nothing toggles them: "
            f"`toggle_action_dimensions` of config.json should be [{index}]"
        )
    return Gripper(index=index, open=-1.0, closed=1.0)
