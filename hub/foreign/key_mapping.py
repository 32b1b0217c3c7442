"""Tensor names of foreign checkpoints and this package's names, as tables of prefixes.

Below a prefix, this package uses the reference implementations' names for a policy, diffusers'
names for the video VAE, and transformers' names for the text encoder. Every table can be read in
both directions. See docs/method.md, "Checkpoint formats".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from wam_policy.errors import WeightsError

T = TypeVar("T")

# Native prefix -> foreign prefix; of several that match a name, the longest applies.
Table = Mapping[str, str]

# Fast-WAM's own files: `payload["mot"]` and `payload["proprio_encoder"]`, joined by a dot.
UPSTREAM = {
    "video.": "mot.mixtures.video.",
    "action.": "mot.mixtures.action.",
    "proprio_encoder.": "proprio_encoder.",
}

# LeRobot's first layout: Fast-WAM's own names inside LeRobot's policy.
LEROBOT_LEGACY = {native: f"model.{foreign}" for native, foreign in UPSTREAM.items()}

# A raw Wan DiT, and Fast-WAM's old files of a video expert alone (`payload["dit"]`).
WAN_DIT = {"video.": ""}

# `backbone_state_dict` in Fast-WAM's file of an action expert.
ACTION_BACKBONE = {"action.": ""}

# Modules that training wraps others in.
WRAPPED = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

# Modules inside which a policy may have been saved.
WRAPPERS = ("policy.", "model.", "dit.", "mot.")

# Other names of the experts in such files.
ALIASES = {"video_expert.": "mixtures.video.", "action_expert.": "mixtures.action."}


def lerobot(layers: int) -> dict[str, str]:
    """Return the table of LeRobot's present layout, which groups both experts' blocks by layer.

    Args:
        layers: Number of blocks of each expert.
    """
    table = dict(LEROBOT_LEGACY)
    for expert in ("video", "action"):
        for i in range(layers):
            table[f"{expert}.blocks.{i}."] = f"model.mot.layers.{i}.blocks.{expert}."
    return table


def light_wam(layers: int) -> dict[str, str]:
    """Return the table of Light-WAM's own files.

    Their tensors are in `payload["mot"]`, `payload["state_fusion_action_expert"]` and
    `payload["proprio_encoder"]`; the foreign names join these keys and the tensors' by a dot.

    Args:
        layers: Number of blocks of the video expert.
    """
    table = {
        "video.": "mot.mixtures.video.",
        "adapters.": "mot.mixtures.video.wam_adapters.",
        "expert.": "state_fusion_action_expert.",
        "proprio_encoder.": "proprio_encoder.",
    }

    # LoRA has a submodule of the attention or of the block per adapted linear layer.
    lora = {"ffn.0": "ffn_lora_in", "ffn.2": "ffn_lora_out"}
    for attention in ("self_attn", "cross_attn"):
        for x in "qkvo":
            lora[f"{attention}.{x}"] = f"{attention}.lora_{x}"

    for i in range(layers):
        for native, foreign in lora.items():
            for side in ("down", "up"):
                table[f"video.blocks.{i}.{native}.lora_{side}."] = (
                    f"mot.mixtures.video.blocks.{i}.{foreign}.{side}_proj."
                )
    return table


def wan_diffusers(layers: int) -> dict[str, str]:
    """Return the table of a Wan DiT in diffusers' names (`WanTransformer3DModel`).

    Args:
        layers: Number of blocks of the DiT.
    """
    table = {
        "video.patch_embedding.": "patch_embedding.",
        "video.time_embedding.0.": "condition_embedder.time_embedder.linear_1.",
        "video.time_embedding.2.": "condition_embedder.time_embedder.linear_2.",
        "video.text_embedding.0.": "condition_embedder.text_embedder.linear_1.",
        "video.text_embedding.2.": "condition_embedder.text_embedder.linear_2.",
        "video.time_projection.1.": "condition_embedder.time_proj.",
        "video.head.head.": "proj_out.",
        "video.head.modulation": "scale_shift_table",
    }

    block = {
        "modulation": "scale_shift_table",
        "norm3.": "norm2.",
        "ffn.0.": "ffn.net.0.proj.",
        "ffn.2.": "ffn.net.2.",
    }
    for native, foreign in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        for x in "qkv":
            block[f"{native}.{x}."] = f"{foreign}.to_{x}."
        for x in "qk":
            block[f"{native}.norm_{x}."] = f"{foreign}.norm_{x}."
        block[f"{native}.o."] = f"{foreign}.to_out.0."

    for i in range(layers):
        for native, foreign in block.items():
            table[f"video.blocks.{i}.{native}"] = f"blocks.{i}.{foreign}"
    return table


def count_blocks(names: Iterable[str], pattern: str = r".*?\bblocks\.(\d+)\.") -> int:
    """Return the number of blocks of a model with these tensor names.

    Args:
        names: Tensor names.
        pattern: Expression whose first group is the index of a block.

    Raises:
        WeightsError: The indices are not 0, 1, 2, …
    """
    matches = (re.match(pattern, name) for name in names)
    indices = {match[1] for match in matches if match is not None}
    count = len(indices)
    missing = {str(i) for i in range(count)} - indices
    if missing:
        raise WeightsError(
            f"the weights hold {count} blocks, but not number {min(map(int, missing))}: the file "
            f"is partial; use the complete file"
        )
    return count


def umt5(layers: int) -> dict[str, str]:
    """Return the table of the original UMT5 encoder.

    Native names are those of `transformers.UMT5EncoderModel`.

    Args:
        layers: Number of blocks of the encoder.
    """
    table = {"shared.": "token_embedding.", "encoder.final_layer_norm.": "norm."}
    block = {
        "0.layer_norm.": "norm1.",
        "0.SelfAttention.q.": "attn.q.",
        "0.SelfAttention.k.": "attn.k.",
        "0.SelfAttention.v.": "attn.v.",
        "0.SelfAttention.o.": "attn.o.",
        "0.SelfAttention.relative_attention_bias.": "pos_embedding.embedding.",
        "1.layer_norm.": "norm2.",
        "1.DenseReluDense.wi_0.": "ffn.gate.0.",
        "1.DenseReluDense.wi_1.": "ffn.fc1.",
        "1.DenseReluDense.wo.": "ffn.fc2.",
    }
    for i in range(layers):
        for native, foreign in block.items():
            table[f"encoder.block.{i}.layer.{native}"] = f"blocks.{i}.{foreign}"
    return table


def wan_vae(stages: int, res_blocks: int, *, residual: bool) -> dict[str, str]:
    """Return the table of Wan's original video VAE.

    Native names are those of `diffusers.AutoencoderKLWan`.

    Args:
        stages: Number of stages, which have different widths.
        res_blocks: Residual blocks per stage of the encoder; the decoder's stages have one more.
        residual: True for Wan 2.2's VAE, whose stages have a shortcut; False for Wan 2.1's.
    """
    table = {"quant_conv.": "conv1.", "post_quant_conv.": "conv2."}
    for side in ("encoder", "decoder"):
        table |= {
            f"{side}.conv_in.": f"{side}.conv1.",
            f"{side}.norm_out.": f"{side}.head.0.",
            f"{side}.conv_out.": f"{side}.head.2.",
            f"{side}.mid_block.attentions.0.": f"{side}.middle.1.",
        }
        table |= _residual_block(f"{side}.mid_block.resnets.0.", f"{side}.middle.0.")
        table |= _residual_block(f"{side}.mid_block.resnets.1.", f"{side}.middle.2.")

    table |= _vae_stages("encoder", "down", stages, res_blocks, residual)
    table |= _vae_stages("decoder", "up", stages, res_blocks + 1, residual)
    return table


def _vae_stages(
    side: str, direction: str, stages: int, res_blocks: int, residual: bool
) -> dict[str, str]:
    """Return the table of the stages of one side of Wan's VAE.

    Args:
        side: "encoder" or "decoder".
        direction: "down" or "up", the direction in which the side resamples.
        stages: Number of stages.
        res_blocks: Residual blocks per stage.
        residual: As in `wan_vae`.
    """
    table: dict[str, str] = {}

    # Wan 2.1 numbers the blocks and resamplers of all stages consecutively.
    position = 0
    for stage in range(stages):
        # All stages but the last end with a resampler.
        has_resampler = stage < stages - 1
        for j in range(res_blocks + has_resampler):
            is_resampler = j == res_blocks
            if residual:
                native = f"{stage}.{direction}sampler." if is_resampler else f"{stage}.resnets.{j}."
                foreign = f"{stage}.{direction}samples.{j}."
            else:
                native = _plain_vae_module(side, direction, stage, j, position, is_resampler)
                foreign = f"{position}."
            native = f"{side}.{direction}_blocks.{native}"
            foreign = f"{side}.{direction}samples.{foreign}"
            position += 1

            if is_resampler:
                table[native] = foreign
            else:
                table |= _residual_block(native, foreign)
    return table


def _plain_vae_module(
    side: str, direction: str, stage: int, j: int, position: int, is_resampler: bool
) -> str:
    """Return the native name, inside its side, of a module of Wan 2.1's VAE.

    Args:
        side: "encoder" or "decoder".
        direction: "down" or "up".
        stage: Index of the module's stage.
        j: Index of the module in its stage.
        position: Index of the module in its side.
        is_resampler: Whether the module is a resampler, not a residual block.
    """
    # diffusers numbers consecutively too, but only in the encoder.
    if side == "encoder":
        return f"{position}."
    if is_resampler:
        return f"{stage}.{direction}samplers.0."
    return f"{stage}.resnets.{j}."


def _residual_block(native: str, foreign: str) -> dict[str, str]:
    """Return the table of a residual block of Wan's VAE with these two prefixes."""
    modules = {
        "norm1": "residual.0",
        "conv1": "residual.2",
        "norm2": "residual.3",
        "conv2": "residual.6",
        "conv_shortcut": "shortcut",
    }
    table = {}
    for native_name, foreign_name in modules.items():
        table[f"{native}{native_name}."] = f"{foreign}{foreign_name}."
    return table


def to_native(tensors: Mapping[str, T], table: Table = UPSTREAM) -> dict[str, T]:
    """Rename foreign tensors to native names.

    Args:
        tensors: Tensors by foreign name.
        table: Prefixes to rename. Other names are kept, so that a strict load reports them.

    Returns:
        The same tensors by native name, in the same order.
    """
    return _rename(tensors, {foreign: native for native, foreign in table.items()})


def policy_to_native(tensors: Mapping[str, T]) -> dict[str, T]:
    """Rename the tensors of a policy in any layout to native names.

    These are the reference implementation's layout, LeRobot's two layouts, and dumps by accelerate,
    in which every tensor has three names.

    Args:
        tensors: Tensors by foreign name.

    Returns:
        The same tensors by native name; names that no layout has are kept.

    Raises:
        WeightsError: Two names of one tensor hold different values.
    """
    bare_tensors: dict[str, T] = {}
    for name, tensor in tensors.items():
        bare_name = _strip_wrappers(name)
        if bare_name in bare_tensors and not is_equal(bare_tensors[bare_name], tensor):
            raise WeightsError(
                f"the weights hold {bare_name!r} twice, with different values; "
                f"the other name is {name!r}"
            )
        bare_tensors[bare_name] = tensor

    # LeRobot's layouts contain the reference implementation's once the wrappers are removed.
    layers = count_blocks(bare_tensors, r"layers\.(\d+)\.")
    table = {}
    for native, foreign in lerobot(layers).items():
        table[native] = foreign.removeprefix("model.mot.").removeprefix("model.")
    return to_native(bare_tensors, table)


def strip_modules(name: str) -> str:
    """Return a tensor's name without the names of the modules that training wraps others in.

    They are those of `torch.compile`, DDP, FSDP and activation checkpointing, wherever they stand.
    """
    *modules, tensor = name.split(".")
    kept = [module for module in modules if module not in WRAPPED]
    return ".".join([*kept, tensor])


def _strip_wrappers(name: str) -> str:
    """Return a tensor's name without the wrappers around a policy and with the usual expert."""
    name = strip_modules(name)
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    for alias, expert in ALIASES.items():
        if name.startswith(alias):
            return expert + name.removeprefix(alias)
    return name


def is_equal(a: object, b: object) -> bool:
    """Return whether two values are the same object or equal tensors."""
    if a is b:
        return True
    return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)


def from_native(tensors: Mapping[str, T], table: Table = UPSTREAM) -> dict[str, T]:
    """Rename native tensors to foreign names.

    Args:
        tensors: Tensors by native name.
        table: Prefixes to rename; other names are kept.

    Returns:
        The same tensors by foreign name, in the same order.
    """
    return _rename(tensors, table)


def _rename(tensors: Mapping[str, T], prefixes: Mapping[str, str]) -> dict[str, T]:
    """Replace the longest matching prefix of each name; names without one are kept."""
    longest_first = sorted(prefixes, key=len, reverse=True)
    renamed = {}
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in longest_first if name.startswith(prefix)), "")
        replacement = prefixes.get(prefix, "")
        renamed[replacement + name.removeprefix(prefix)] = tensor
    return renamed
