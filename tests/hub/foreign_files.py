"""Checkpoints as other projects publish them, of a tiny model with LIBERO's sizes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from tiny import LIGHT_SIZES
from torch import Tensor

from wam_policy.hub.foreign import key_mapping
from wam_policy.models.config import FastWAMConfig, LightWAMConfig
from wam_policy.models.fast_wam.model import FastWAM
from wam_policy.models.light_wam.model import LightWAM
from wam_policy.presets import PROMPT, ReleaseInfo

SIZES = FastWAMConfig(
    action_dim=7,
    proprio_dim=8,
    latent_channels=4,
    video_dim=16,
    video_ffn_dim=24,
    action_expert_dim=12,
    action_expert_ffn_dim=20,
    layers=2,
    heads=2,
    head_dim=12,
    text_dim=8,
    freq_dim=8,
)
LIBERO = "libero_uncond_2cam224"
# What a file of `upstream` does not record.
RELEASE = ReleaseInfo(preset="libero", variant="fast", action_shift=5.0, head_dim=SIZES.head_dim)
LAYOUTS = {"legacy": key_mapping.LEROBOT_LEGACY, "current": key_mapping.lerobot(SIZES.layers)}


def tensors(dtype: torch.dtype = torch.bfloat16, sizes: FastWAMConfig = SIZES) -> dict[str, Tensor]:
    """Return a Fast-WAM's weights by native names."""
    torch.manual_seed(0)
    return {name: x.to(dtype) for name, x in FastWAM(sizes).state_dict().items()}


def statistics(state: int = 8, action: int = 7) -> dict:
    """Return the content of a `dataset_stats.json` for vectors of these lengths."""

    def group(dim: int) -> dict:
        values = {"min": -2.0, "max": 2.0, "mean": 0.5, "std": 2.0, "q01": -1.0, "q99": 1.0}
        return {"default": {f"global_{name}": [value] * dim for name, value in values.items()}}

    return {"state": group(state), "action": group(action), "num_episodes": 1, "num_transition": 9}


def upstream(
    folder: Path, ours: dict[str, Tensor], stem: str = LIBERO, stats: dict | None = None
) -> Path:
    """Write a file of Fast-WAM's repository, with its statistics beside it.

    Args:
        folder: Folder to write into.
        ours: Weights by native names.
        stem: Name of the file, which tells a release.
        stats: Content of the statistics; None for those of `statistics`.

    Returns:
        Path of the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    payload: dict[str, Any] = {"mot": {}, "proprio_encoder": {}}
    for name, tensor in key_mapping.from_native(ours).items():
        group, _, rest = name.partition(".")
        payload[group][rest] = tensor
    payload["step"] = 7
    payload["torch_dtype"] = "torch.bfloat16"

    path = folder / f"{stem}.pt"
    torch.save(payload, path)
    content = statistics() if stats is None else stats
    (folder / f"{stem}_dataset_stats.json").write_text(json.dumps(content))
    return path


def lerobot(
    folder: Path,
    ours: dict[str, Tensor],
    layout: str = "current",
    visual: str = "IDENTITY",
    dims=(8, 7),
    **changes,
) -> Path:
    """Write a checkpoint folder of LeRobot's.

    Args:
        folder: Folder to write.
        ours: Weights by native names.
        layout: Key of `LAYOUTS`.
        visual: Normalisation mode of images.
        dims: Lengths of state and action in the statistics.
        changes: Entries of `config.json` that differ from LIBERO's.

    Returns:
        The folder.
    """
    folder.mkdir(exist_ok=True)
    weights = key_mapping.from_native(ours, LAYOUTS[layout])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    modes = {"VISUAL": visual, "STATE": "MIN_MAX", "ACTION": "MIN_MAX"}
    config = _lerobot_config(modes) | changes
    (folder / "config.json").write_text(json.dumps(config))

    stats = _lerobot_statistics(*dims)
    _write_processor(folder, "policy_preprocessor", "normalizer_processor", modes, stats)
    _write_processor(folder, "policy_postprocessor", "unnormalizer_processor", modes, stats)
    return folder


def _lerobot_config(modes: dict[str, str]) -> dict[str, Any]:
    """Return the content of `config.json` for LIBERO."""
    features = {
        "observation.images.wrist_image": {"type": "VISUAL", "shape": [3, 224, 224]},
        "observation.images.image": {"type": "VISUAL", "shape": [3, 224, 224]},
        "observation.state": {"type": "STATE", "shape": [8]},
    }
    return {
        "type": "fastwam",
        "n_obs_steps": 1,
        "action_dim": 7,
        "proprio_dim": 8,
        "action_horizon": 32,
        "n_action_steps": 10,
        "num_video_frames": 33,
        "action_video_freq_ratio": 4,
        "image_size": [224, 448],
        "tokenizer_model_id": "google/umt5-xxl",
        "text_encoder_model_id": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        "tokenizer_max_len": 128,
        "use_relative_actions": False,
        "torch_dtype": "bfloat16",
        "prompt_template": PROMPT.template,
        "num_inference_steps": 10,
        "inference_seed": 42,
        "sigma_shift": None,
        "text_cfg_scale": 1.0,
        "toggle_action_dimensions": [-1],
        "video_scheduler": {"train_shift": 5.0, "infer_shift": 5.0, "num_train_timesteps": 1000},
        "action_scheduler": {"train_shift": 5.0, "infer_shift": 5.0, "num_train_timesteps": 1000},
        "action_dit_config": {"num_heads": SIZES.heads, "attn_head_dim": SIZES.head_dim},
        "normalization_mapping": modes,
        "input_features": features,
        "output_features": {"action": {"type": "ACTION", "shape": [7]}},
    }


def _lerobot_statistics(state: int, action: int) -> dict[str, Tensor]:
    """Return the tensors of a processor, for vectors of these lengths and two cameras."""
    stats = {}
    for name, dim in (("observation.state", state), ("action", action)):
        stats[f"{name}.min"] = torch.full((dim,), -2.0)
        stats[f"{name}.max"] = torch.full((dim,), 2.0)
    for camera in ("image", "wrist_image"):
        for name in ("mean", "std"):
            stats[f"observation.images.{camera}.{name}"] = torch.full((3, 1, 1), 0.5)
    return stats


def _write_processor(
    folder: Path, pipeline: str, step: str, modes: dict[str, str], stats: dict[str, Tensor]
) -> None:
    """Write the files of a processor, whose step `step` normalises."""
    state_file = f"{pipeline}_step_1_{step}.safetensors"
    save_file(stats, folder / state_file)
    rename = {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}}
    normalize = {
        "registry_name": step,
        "config": {"eps": 1e-8, "features": {}, "norm_map": modes},
        "state_file": state_file,
    }
    content = {"name": pipeline, "steps": [rename, normalize]}
    (folder / f"{pipeline}.json").write_text(json.dumps(content))


LIGHT_RUN = {
    "model": {
        # Released files have targets, which are never followed.
        "_target_": "os.system",
        "wam_adapter": {
            "use_wam_adapter": True,
            "remove_original_action_expert": True,
            "adapter_layer_indices": [0, 2],
            "adapter_dim": 5,
            "adapter_scale": 1.0,
            "use_backbone_lora": True,
            "lora_rank": 3,
            "lora_alpha": 6.0,
            "lora_target_modules": [
                "self_attn.q",
                "self_attn.k",
                "self_attn.v",
                "self_attn.o",
                "ffn",
                "cross_attn.q",
                "cross_attn.k",
                "cross_attn.v",
                "cross_attn.o",
            ],
        },
        "state_fusion_action_expert_config": {
            "per_layer_dim": 10,
            "trunk_dim": 12,
            "token_pooling_type": "learned_query",
            "token_pooling_num_queries": 5,
            "token_pooling_num_heads": 2,
            "feature_sources": ["h_prime"],
        },
        "loss": {
            "action_temporal_weighting": {
                "enabled": True,
                "num_prefix_steps": 8,
                "prefix_weight": 1.0,
                "tail_weight": 0.0,
            }
        },
        "video_latent_spatial_downsample_factor": 2,
        "apply_video_latent_downsample_to_action_branch": False,
    },
    "data": {
        "train": {
            "dataset_dirs": ["./data/libero_spatial_no_noops_lerobot"],
            "num_frames": 33,
            "action_video_freq_ratio": 4,
            "concat_multi_camera": "horizontal",
            "processor": {
                "norm_default_mode": "min/max",
                "proprio_output_dim": 8,
                "note": "${eval:'__import__(1)'}",
            },
        }
    },
}
LIGHT = replace(LIGHT_SIZES, action_dim=7, proprio_dim=8)


def light_tensors(
    sizes: LightWAMConfig = LIGHT, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Return a Light-WAM's weights by native names."""
    torch.manual_seed(0)
    model = LightWAM(sizes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return {name: x.to(dtype) for name, x in model.state_dict().items()}


def light_upstream(
    run: Path, ours: dict[str, Tensor], config: dict | str | None = None, stats: dict | None = None
) -> Path:
    """Write a training run of the Light-WAM repository.

    Args:
        run: Folder of the run.
        ours: Weights by native names.
        config: Content of `config.yaml`, or its text; None for `LIGHT_RUN`.
        stats: Content of the statistics; None for those of `statistics`.

    Returns:
        Path of the weights.
    """
    folder = run / "checkpoints/weights"
    folder.mkdir(parents=True, exist_ok=True)
    groups: dict[str, Any] = {"mot": {}, "state_fusion_action_expert": {}, "proprio_encoder": {}}
    table = key_mapping.light_wam(LIGHT.layers)
    for name, tensor in key_mapping.from_native(ours, table).items():
        group, _, rest = name.partition(".")
        groups[group][rest] = tensor

    # A policy without proprioception has no group for it.
    payload = {group: tensors for group, tensors in groups.items() if tensors}
    payload |= {"step": 55000, "torch_dtype": "torch.bfloat16"}
    path = folder / "step_055000.pt"
    torch.save(payload, path)

    text = config
    if not isinstance(config, str):
        text = yaml.safe_dump(LIGHT_RUN if config is None else config)
    (run / "config.yaml").write_text(text)
    content = statistics() if stats is None else stats
    (run / "dataset_stats.json").write_text(json.dumps(content))
    return path
