"""One batch size of a compiled policy: its memory, allocated once, and its two functions over it."""

# B batch, T actions in a chunk, A numbers per action

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wam_policy import acting, images
from wam_policy.config import PolicyConfig
from wam_policy.inference import hot
from wam_policy.inference.compiling import Compiler
from wam_policy.inference.text import Entry
from wam_policy.models import sampling
from wam_policy.models.build import Model
from wam_policy.models.fast_wam import FastWAM
from wam_policy.models.layers import KeyValue, Rope, Text
from wam_policy.models.light_wam import LightWAM
from wam_policy.models.state_fusion import Taps
from wam_policy.models.variants import ActionMode


class Options(NamedTuple):
    """What a policy is compiled for."""

    mode: ActionMode
    horizon: int  # actions per chunk
    batch_sizes: tuple[int, ...]  # rising
    encode_every: int = 1  # calls that one observation's encoding serves


class Forward(NamedTuple):
    """What is the same in every bucket."""

    config: PolicyConfig
    model: Model  # a Fast-WAM, best with fused projections, or a lean Light-WAM
    codec: hot.Codec  # on the model's device
    frames: int  # latent frames of a clip
    options: Options


@dataclass
class Bucket:
    """One batch size."""

    size: int
    inputs: hot.Inputs
    texts: list[Text]
    entries: list[list[Entry] | None]  # what is in each sample's slots
    tables: sampling.Tables | Rope
    memory: list[KeyValue]  # of the observed frame, written by `encode`; a Light-WAM's `encode` returns what it leaves
    see: Callable[[], Tensor]  # latents of the picture, what `encode` begins with; to be measured alone
    encode: Callable[[], Any]  # what it returns is for `act`
    act: Callable[[Any], Tensor]  # normalised actions [B, T, A]
    plain: Callable[[], Tensor]  # both, not compiled, on the same memory


def build(forward: Forward, texts: list[Text], compiler: Compiler, size: int) -> Bucket:
    """Allocate a bucket and compute what is constant in it; its functions are compiled when they are first called.

    Args:
        forward: what it computes.
        texts: a text of each expert with empty slots for every sample.
        compiler: how it is compiled.
        size: B.
    """
    like, config = forward.model.video.patch_embedding.weight, forward.config  # never quantized: device and dtype
    image = like.new_zeros(size, 3, *images.canvas_size(config.cameras))
    proprio = None if config.state is None else like.new_zeros(size, len(config.state.names))
    make = _fast if isinstance(forward.model, FastWAM) else _light
    return make(forward, hot.Inputs(image, proprio), texts, compiler)


def _light(forward: Forward, inputs: hot.Inputs, texts: list[Text], compiler: Compiler) -> Bucket:
    _, model, codec, _, options = forward
    assert isinstance(model, LightWAM)
    size, horizon, rope = len(inputs.image), options.horizon, model.video.rope(codec(inputs.image))
    see, know = compiler.function(codec), compiler.function(hot.add_proprio)
    look, act = compiler.function(hot.encode_light), compiler.function(hot.act_light)

    def encode() -> Taps:
        know(model, inputs.proprio, texts)
        return look(model, codec, inputs, rope, texts[0])

    def plain() -> Tensor:
        hot.add_proprio(model, inputs.proprio, texts)
        return hot.act_light(model, hot.encode_light(model, codec, inputs, rope, texts[0]), horizon)

    return Bucket(
        size,
        inputs,
        texts,
        [None] * size,
        rope,
        [],
        compiler.graph(lambda: see(inputs.image)),
        compiler.graph(encode),
        compiler.graph(lambda taps: act(model, taps, horizon)),
        plain,
    )


def _fast(forward: Forward, inputs: hot.Inputs, texts: list[Text], compiler: Compiler) -> Bucket:
    config, model, codec, frames, options = forward
    assert isinstance(model, FastWAM)
    size, first, time = len(inputs.image), codec(inputs.image), acting.time_dtype(model)
    frames = 1 if options.mode == "first_frame" else frames
    action, video = (acting.schedule(config, model, shift) for shift in (config.sampling.action_shift, None))
    tables = sampling.tables(model, first, frames, options.horizon, action, video)
    noise = first.new_zeros((size, options.horizon, config.action.layout.dim), dtype=time)
    known = sampling.Known(torch.zeros_like(noise), noise.new_zeros(size, options.horizon, 1))
    future = None if frames == 1 else first.new_zeros((*first.shape[:2], frames - 1, *first.shape[3:]), dtype=time)
    inputs = inputs._replace(noise=noise, known=known, noise_video=future)
    shape = (size, model.config.heads, len(tables.first.cos), model.config.head_dim)
    memory = [KeyValue(first.new_zeros(shape), first.new_zeros(shape)) for _ in range(model.config.layers)]
    observed = sampling.Observed(memory, *texts)
    see, know, look = compiler.function(codec), compiler.function(hot.add_proprio), compiler.function(hot.encode_fast)
    moves = sampling.Moves(
        compiler.function(sampling.action_step),
        compiler.function(sampling.video_step),
        compiler.function(sampling.watch_future),
    )

    def encode() -> None:
        know(model, inputs.proprio, texts)
        look(model, codec, inputs, tables, observed)

    def plain() -> Tensor:
        hot.add_proprio(model, inputs.proprio, texts)
        hot.encode_fast(model, codec, inputs, tables, observed)
        return hot.act_fast(model, inputs, tables, observed, options.mode, sampling.PLAIN)

    return Bucket(
        size,
        inputs,
        texts,
        [None] * size,
        tables,
        memory,
        compiler.graph(lambda: see(inputs.image)),
        compiler.graph(encode),
        compiler.graph(lambda _: hot.act_fast(model, inputs, tables, observed, options.mode, moves)),
        plain,
    )
