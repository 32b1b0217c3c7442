"""Policies of three sizes with random weights: what the benchmarks run on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from wam_policy import WAMPolicy
from wam_policy.config import Family, Form, PolicyConfig, Source
from wam_policy.hub import checkpoint, forms
from wam_policy.hub.foreign import wan
from wam_policy.models.config import FastWAMConfig, LightWAMConfig
from wam_policy.models.encoders.text import PromptEmbeddings
from wam_policy.models.encoders.vae import VAE, build_vae
from wam_policy.normalize import Normalization
from wam_policy.presets import ReleaseInfo, release_config

TASK = "put the bowl on the plate"
TOKENS = 24  # of its prompt
Size = Literal["full", "mid", "tiny"]


def _libero(sizes: FastWAMConfig | LightWAMConfig) -> PolicyConfig:
    """The contract of the released LIBERO checkpoints, their codec beside them."""
    unit = {"min": (-1.0,), "max": (1.0,)}
    state, action = (
        Normalization(
            mode="min_max", statistics={name: value * dim for name, value in unit.items()}
        )
        for dim in (8, 7)
    )
    trained = ReleaseInfo(preset="libero")
    if isinstance(sizes, FastWAMConfig):
        trained = ReleaseInfo(preset="libero", variant="fast", action_shift=5.0)
    return replace(
        release_config(trained, sizes, state=state, action=action, dtype="bfloat16"),
        vae=Source(subfolder="vae"),
    )


def full(family: Family) -> PolicyConfig:
    """The released size: 6 or 2 billion parameters."""
    return _libero(
        (FastWAMConfig if family == "fast_wam" else LightWAMConfig)(action_dim=7, proprio_dim=8)
    )


def smaller(family: Family, size: Size) -> PolicyConfig:
    """A twelve-layer policy of width 768, or a three-layer one of width 96, on pictures of 64 or 32 pixels."""
    mid = size == "mid"
    layers, width, heads, side = (12, 768, 12, 64) if mid else (3, 96, 4, 32)
    shared: dict[str, Any] = {
        "action_dim": 7,
        "proprio_dim": 8,
        "latent_channels": 16,
        "text_dim": 512 if mid else 32,
    }
    shared |= {
        "video_dim": width,
        "video_ffn_dim": 4 * width,
        "layers": layers,
        "heads": heads,
        "head_dim": width // heads,
    }
    if family == "fast_wam":
        config = _libero(
            FastWAMConfig(action_expert_dim=width // 2, action_expert_ffn_dim=2 * width, **shared)
        )
    else:
        taps = (layers // 3 - 1, 2 * layers // 3 - 1, layers - 2) if mid else (0, 1)
        features: Any = (("adapted",),) * len(taps)
        head: dict[str, Any] = {
            "layer_dim": 2 * width,
            "trunk_dim": 2 * width,
            "adapter_dim": width // 4,
            "lora_rank": width // 12,
        }
        config = _libero(LightWAMConfig(taps=taps, features=features, **head, **shared))
    return replace(config, cameras=replace(config.cameras, height=side, width=side))


def random_codec(config: PolicyConfig, size: Size = "full") -> VAE:
    """A codec of Wan 2.2's or Wan 2.1's architecture, at their size or a small one."""
    wan22, small = isinstance(config.model, FastWAMConfig), size != "full"
    channels = config.model.latent_channels
    made: dict[str, Any] = dict(wan.WAN22_CODEC) if wan22 else {}
    if small:
        made |= {"base_dim": 16, "decoder_base_dim": 32, "z_dim": channels}
        made |= {
            name: made[name][:channels] for name in ("latents_mean", "latents_std") if name in made
        }
    return build_vae(made).eval()


def _randomize(
    weights: dict[str, Tensor], generator: torch.Generator, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Numbers of deviation 0.02, norms at one."""
    made = {}
    for name, x in weights.items():
        empty = torch.empty(x.shape, dtype=dtype)
        norm = "norm" in name and name.endswith("weight")
        made[name] = empty.fill_(1) if norm else empty.normal_(0, 0.02, generator=generator)
    return made


def random_parts(
    config: PolicyConfig, size: Size = "full", dtype: torch.dtype = torch.bfloat16
) -> checkpoint.PolicyParts:
    """Everything of a checkpoint, seeded."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)  # of the codec's own initialisation
    model = checkpoint.empty_model(config).eval()
    model.load_state_dict(_randomize(dict(model.state_dict()), generator, dtype), assign=True)
    embedding = torch.randn(TOKENS, config.model.text_dim, generator=generator).to(dtype)
    table = {config.prompt.prompt(TASK): embedding}
    prompts = PromptEmbeddings(
        table, token_length=config.prompt.token_length, text_dim=config.model.text_dim
    )
    codec = random_codec(config, size).to(dtype)
    return checkpoint.PolicyParts(config, model, lambda: codec, prompts)


def write(folder: Path, config: PolicyConfig, form: Form) -> None:
    """Write a full-size checkpoint."""
    parts = forms.to_form(random_parts(config), form, None, None, folder)
    checkpoint.write_checkpoint(
        folder, parts, dtype=None, load_by=str(folder), notes="Random weights, for the benchmarks."
    )


def policy(family: Family, size: Size, dtype: torch.dtype) -> WAMPolicy:
    """A policy with random weights; one of full size is written to runs/ first, and mapped from there."""
    if size != "full":
        parts = random_parts(smaller(family, size), size, dtype)
        return WAMPolicy(parts.config, parts.model, vae=parts.vae, prompts=parts.prompts)
    folder = Path(f"runs/full-size-{family}" + ("" if family == "fast_wam" else "-fat"))
    if not (folder / checkpoint.CONFIG).is_file():
        print(f"writing {folder} …", flush=True)
        write(folder, full(family), "fat")
    return WAMPolicy.from_pretrained(folder, dtype=dtype)
