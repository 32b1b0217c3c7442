"""The two hot functions of each family, encode an observation and act on it: fixed shapes, no branches on data.

They are run as they are or compiled; everything constant comes in, everything that lasts is written into what comes in.
"""

# B batch, H W pixels, C latent channels, F latent frames, h w latent grid, P numbers of proprioception, T actions in a chunk,
# A numbers per action

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wam_policy.inference.text_cache import text_experts
from wam_policy.models.fast_wam import sampling
from wam_policy.models.fast_wam.model import FastWAM
from wam_policy.models.fast_wam.variants import ActionMode
from wam_policy.models.layers.attention import KeyValue
from wam_policy.models.layers.mot import write_kv
from wam_policy.models.layers.rope import Rope
from wam_policy.models.layers.transformer import Block, Text
from wam_policy.models.light_wam.action_head import Taps
from wam_policy.models.light_wam.folded import LeanBlock
from wam_policy.models.light_wam.model import LightWAM
from wam_policy.models.registry import Model

ImageEncoder = Callable[[Tensor], Tensor]
"""Pictures [B, 3, H, W] -> latents [B, C, 1, h, w]."""


class StaticBuffers(NamedTuple):
    """What a call brings, on the device."""

    image: Tensor  # [B, 3, H, W] in [-1, 1]
    proprio: Tensor | None  # [B, P]
    noise: Tensor | None = None  # [B, T, A] of the actions; None: the model takes none
    target: sampling.NormalizedTarget | None = (
        None  # of the actions; None: the model takes no noise
    )
    noise_video: Tensor | None = (
        None  # [B, C, F − 1, h, w] of the frames after the observed one; None: nobody needs them
    )


def add_proprio(model: Model, proprio: Tensor | None, texts: Sequence[Text]) -> None:
    """Write the proprio token's keys and values into its slot, the first, of every expert's text.

    A function of its own, so that no compiled function reads what it writes.
    """
    if proprio is None:
        return
    assert isinstance(model.proprio_encoder, nn.Linear)
    token = model.proprio_encoder(proprio).unsqueeze(1)
    for expert, text in zip(text_experts(model), texts, strict=True):
        embedded = expert.text_embedding(token)
        for block, slots in zip(expert.blocks, text.layers, strict=True):
            write_kv(_text(block, embedded), slots)


@torch.compiler.nested_compile_region  # see `mot.run`
def _text(block: Block | LeanBlock, embedded: Tensor) -> KeyValue:
    return block.text_key_value(embedded).returned()


def encode_fast(
    model: FastWAM,
    codec: ImageEncoder,
    inputs: StaticBuffers,
    tables: sampling.SamplerConstants,
    observed: sampling.PrefillCache,
) -> None:
    """Write an observation's keys and values into those of `observed`; the proprio token is in the text already."""
    cache = sampling.prefill(model, codec(inputs.image), tables, observed.video_text)
    for own, place in zip(cache, observed.video_kv, strict=True):
        write_kv(own, place)


def act_fast(
    model: FastWAM,
    inputs: StaticBuffers,
    tables: sampling.SamplerConstants,
    observed: sampling.PrefillCache,
    mode: ActionMode,
    moves: sampling.SamplerSteps,
) -> Tensor:
    """Normalised actions [B, T, A] for the observation in `observed`: all steps, each by the compiled `moves`."""
    assert inputs.noise is not None
    noises = (inputs.noise, inputs.noise_video)
    return sampling.denoise(
        model,
        tables,
        observed,
        *noises,
        mode=mode,
        decode_video=False,
        target=inputs.target,
        steps=moves,
    )[0]


def encode_light(
    model: LightWAM, codec: ImageEncoder, inputs: StaticBuffers, rope: Rope, text: Text
) -> Taps:
    """What the taps record of an observation; the proprio token is in the text already."""
    return model.tap_features(codec(inputs.image), text, rope)


def act_light(model: LightWAM, taps: Taps, horizon: int) -> Tensor:
    """Normalised actions [B, horizon, A]."""
    return model.expert(taps, horizon)
