"""Foreign checkpoints' tensor names and ours: tables of prefixes, read in both directions.

Ours are, below a prefix, the reference's own names; the codec's are diffusers', the text encoder's transformers'.
Source: spec/fastwam.md section 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from wam_policy.errors import WeightsError

T = TypeVar("T")
Table = Mapping[str, str]  # our prefix -> theirs; the longest that fits counts

# upstream's `payload["mot"]` and `payload["proprio_encoder"]`, joined by a dot
UPSTREAM = {
    "video.": "mot.mixtures.video.",
    "action.": "mot.mixtures.action.",
    "proprio_encoder.": "proprio_encoder.",
}
# LeRobot's first layout: upstream's names inside its policy
LEROBOT_LEGACY = {ours: f"model.{theirs}" for ours, theirs in UPSTREAM.items()}
# a raw Wan DiT, and upstream's old files of a video expert alone (`payload["dit"]`)
WAN_DIT = {"video.": ""}
# `backbone_state_dict` of upstream's action expert file
ACTION_BACKBONE = {"action.": ""}
# modules a policy's weights may have been saved inside of, and other names of its experts there
WRAPPERS = ("module.", "policy.", "model.", "dit.", "mot.")
ALIASES = {"video_expert.": "mixtures.video.", "action_expert.": "mixtures.action."}


def lerobot(layers: int) -> dict[str, str]:
    """LeRobot's present layout: the blocks of both experts stand side by side, layer by layer."""
    blocks = {
        f"{expert}.blocks.{i}.": f"model.mot.layers.{i}.blocks.{expert}."
        for expert in ("video", "action")
        for i in range(layers)
    }
    return LEROBOT_LEGACY | blocks


def light_wam(layers: int) -> dict[str, str]:
    """Light-WAM upstream's `payload["mot"]`, `["state_fusion_action_expert"]` and `["proprio_encoder"]`, joined by a dot."""
    table = {
        "video.": "mot.mixtures.video.",
        "adapters.": "mot.mixtures.video.wam_adapters.",
        "expert.": "state_fusion_action_expert.",
        "proprio_encoder.": "proprio_encoder.",
    }
    places = {
        f"{name}.{x}": f"{name}.lora_{x}" for name in ("self_attn", "cross_attn") for x in "qkvo"
    }
    places |= {"ffn.0": "ffn_lora_in", "ffn.2": "ffn_lora_out"}
    for i in range(layers):
        for ours, theirs in places.items():
            for side in ("down", "up"):
                table[f"video.blocks.{i}.{ours}.lora_{side}."] = (
                    f"mot.mixtures.video.blocks.{i}.{theirs}.{side}_proj."
                )
    return table


def wan_diffusers(layers: int) -> dict[str, str]:
    """A Wan DiT in diffusers' names (`WanTransformer3DModel`)."""
    table = {
        "video.patch_embedding.": "patch_embedding.",
        "video.time_projection.1.": "condition_embedder.time_proj.",
        "video.head.head.": "proj_out.",
        "video.head.modulation": "scale_shift_table",
    }
    for ours, theirs in (("time_embedding", "time_embedder"), ("text_embedding", "text_embedder")):
        for i in (0, 2):
            table[f"video.{ours}.{i}."] = f"condition_embedder.{theirs}.linear_{i // 2 + 1}."
    inside = {
        "modulation": "scale_shift_table",
        "norm3.": "norm2.",
        "ffn.0.": "ffn.net.0.proj.",
        "ffn.2.": "ffn.net.2.",
    }
    for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        inside |= {f"{ours}.{x}.": f"{theirs}.to_{x}." for x in "qkv"}
        inside |= {f"{ours}.o.": f"{theirs}.to_out.0."} | {
            f"{ours}.norm_{x}.": f"{theirs}.norm_{x}." for x in "qk"
        }
    for i in range(layers):
        table |= {
            f"video.blocks.{i}.{ours}": f"blocks.{i}.{theirs}" for ours, theirs in inside.items()
        }
    return table


def blocks(names: Iterable[str]) -> int:
    """How many blocks a DiT of these foreign names has."""
    return 1 + max(
        (int(m[1]) for name in names if (m := re.search(r"\bblocks\.(\d+)\.", name))), default=-1
    )


def umt5(layers: int) -> dict[str, str]:
    """The original UMT5 encoder; ours is `transformers.UMT5EncoderModel`."""
    table = {"shared.": "token_embedding.", "encoder.final_layer_norm.": "norm."}
    for i in range(layers):
        ours, theirs = f"encoder.block.{i}.layer.", f"blocks.{i}."
        table |= {
            f"{ours}0.layer_norm.": f"{theirs}norm1.",
            **{f"{ours}0.SelfAttention.{name}.": f"{theirs}attn.{name}." for name in "qkvo"},
            f"{ours}0.SelfAttention.relative_attention_bias.": f"{theirs}pos_embedding.embedding.",
            f"{ours}1.layer_norm.": f"{theirs}norm2.",
            f"{ours}1.DenseReluDense.wi_0.": f"{theirs}ffn.gate.0.",
            f"{ours}1.DenseReluDense.wi_1.": f"{theirs}ffn.fc1.",
            f"{ours}1.DenseReluDense.wo.": f"{theirs}ffn.fc2.",
        }
    return table


def wan_vae(stages: int, res_blocks: int, *, residual: bool) -> dict[str, str]:
    """The original Wan codec; ours is `diffusers.AutoencoderKLWan`.

    Args:
        stages: stages of different width.
        res_blocks: residual blocks per stage of the encoder; the decoder's have one more.
        residual: True for Wan 2.2's codec, whose stages have a shortcut; False for Wan 2.1's.
    """
    table = {"quant_conv.": "conv1.", "post_quant_conv.": "conv2."}
    for side in ("encoder", "decoder"):
        table |= {
            f"{side}.conv_in.": f"{side}.conv1.",
            f"{side}.norm_out.": f"{side}.head.0.",
            f"{side}.conv_out.": f"{side}.head.2.",
            f"{side}.mid_block.attentions.0.": f"{side}.middle.1.",
        }
        for i in (0, 1):
            table |= _residual_block(f"{side}.mid_block.resnets.{i}.", f"{side}.middle.{2 * i}.")
    flat = {
        "encoder": 0,
        "decoder": 0,
    }  # Wan 2.1 counts blocks and resamplers of all stages in one row
    for stage in range(stages):
        for side, plural, blocks in (
            ("encoder", "down", res_blocks),
            ("decoder", "up", res_blocks + 1),
        ):
            ours, theirs = f"{side}.{plural}_blocks.", f"{side}.{plural}samples."
            resampler = f"{stage}.{plural}sampler." if residual else f"{stage}.{plural}samplers.0."
            for j in range(blocks + (stage < stages - 1)):
                there = (
                    f"{theirs}{stage}.{plural}samples.{j}."
                    if residual
                    else f"{theirs}{flat[side]}."
                )
                here = f"{ours}{stage}.resnets.{j}." if j < blocks else f"{ours}{resampler}"
                if side == "encoder" and not residual:
                    here = f"{ours}{flat[side]}."
                flat[side] += 1
                table |= _residual_block(here, there) if j < blocks else {here: there}
    return table


def _residual_block(ours: str, theirs: str) -> dict[str, str]:
    inside = {
        "norm1": "residual.0",
        "conv1": "residual.2",
        "norm2": "residual.3",
        "conv2": "residual.6",
        "conv_shortcut": "shortcut",
    }
    return {f"{ours}{here}.": f"{theirs}{there}." for here, there in inside.items()}


def to_native(tensors: Mapping[str, T], table: Table = UPSTREAM) -> dict[str, T]:
    """Rename foreign tensors to our names; names the table doesn't know are kept, so that a strict load reports them."""
    return _rename(tensors, {theirs: ours for ours, theirs in table.items()})


def policy_to_native(tensors: Mapping[str, T]) -> dict[str, T]:
    """Rename a policy's tensors of any layout: upstream's, LeRobot's two, an accelerate dump with every name three times.

    Raises:
        WeightsError: two names of one tensor hold different values.
    """
    plain: dict[str, T] = {}
    for name, tensor in tensors.items():
        bare = name
        while bare.startswith(WRAPPERS):
            bare = bare.partition(".")[2]
        bare = next(
            (
                to + bare.removeprefix(alias)
                for alias, to in ALIASES.items()
                if bare.startswith(alias)
            ),
            bare,
        )
        if bare in plain and not _equal(plain[bare], tensor):
            raise WeightsError(
                f"the weights hold {bare!r} twice, with different values; the other name is {name!r}"
            )
        plain[bare] = tensor
    layers = {int(m[1]) for name in plain if (m := re.match(r"layers\.(\d+)\.", name))}
    table = lerobot(max(layers, default=-1) + 1)
    return to_native(
        plain,
        {
            ours: theirs.removeprefix("model.mot.").removeprefix("model.")
            for ours, theirs in table.items()
        },
    )


def _equal(a: T, b: T) -> bool:
    return a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b))


def from_native(tensors: Mapping[str, T], table: Table = UPSTREAM) -> dict[str, T]:
    """Rename our tensors to foreign names."""
    return _rename(tensors, table)


def _rename(tensors: Mapping[str, T], prefixes: Table) -> dict[str, T]:
    longest_first = sorted(prefixes, key=len, reverse=True)
    renamed = {}
    for name, tensor in tensors.items():
        old = next((prefix for prefix in longest_first if name.startswith(prefix)), None)
        renamed[name if old is None else prefixes[old] + name.removeprefix(old)] = tensor
    return renamed
