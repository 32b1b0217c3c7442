"""One batch size of a compiled policy: its memory, allocated once, and its two functions over it."""

# B batch, T actions in a chunk, A numbers per action

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wam_policy import images, sampling
from wam_policy.config import PolicyConfig
from wam_policy.inference import stages
from wam_policy.inference.text_cache import Entry
from wam_policy.models.fast_wam import sampling as fast_sampling
from wam_policy.models.fast_wam.model import FastWAM
from wam_policy.models.fast_wam.variants import ActionMode
from wam_policy.models.layers.attention import KeyValue
from wam_policy.models.layers.rope import Rope
from wam_policy.models.layers.transformer import Text
from wam_policy.models.light_wam.action_head import Taps
from wam_policy.models.light_wam.model import LightWAM
from wam_policy.models.registry import Model
from wam_policy.utils.compiler import Compiler


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
    codec: stages.Codec  # on the model's device
    frames: int  # latent frames of a clip
    options: Options


@dataclass
class Bucket:
    """One batch size."""

    size: int
    inputs: stages.Inputs
    texts: list[Text]
    entries: list[list[Entry] | None]  # what is in each sample's slots
    tables: fast_sampling.Tables | Rope
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
    return make(forward, stages.Inputs(image, proprio), texts, compiler)


def _light(forward: Forward, inputs: stages.Inputs, texts: list[Text], compiler: Compiler) -> Bucket:
    _, model, codec, _, options = forward
    assert isinstance(model, LightWAM)
    size, horizon, rope = len(inputs.image), options.horizon, model.video.rope(codec(inputs.image))
    see, know = compiler.function(codec), compiler.function(stages.add_proprio)
    look, act = compiler.function(stages.encode_light), compiler.function(stages.act_light)

    def encode() -> Taps:
        know(model, inputs.proprio, texts)
        return look(model, codec, inputs, rope, texts[0])

    def plain() -> Tensor:
        stages.add_proprio(model, inputs.proprio, texts)
        return stages.act_light(model, stages.encode_light(model, codec, inputs, rope, texts[0]), horizon)

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


def _fast(forward: Forward, inputs: stages.Inputs, texts: list[Text], compiler: Compiler) -> Bucket:
    config, model, codec, frames, options = forward
    assert isinstance(model, FastWAM)
    size, first, time = len(inputs.image), codec(inputs.image), sampling.time_dtype(model)
    frames = 1 if options.mode == "first_frame" else frames
    action, video = (sampling.schedule(config, model, shift) for shift in (config.sampling.action_shift, None))
    tables = fast_sampling.tables(model, first, frames, options.horizon, action, video)
    noise = first.new_zeros((size, options.horizon, config.action.layout.dim), dtype=time)
    known = fast_sampling.Known(torch.zeros_like(noise), noise.new_zeros(size, options.horizon, 1))
    future = None if frames == 1 else first.new_zeros((*first.shape[:2], frames - 1, *first.shape[3:]), dtype=time)
    inputs = inputs._replace(noise=noise, known=known, noise_video=future)
    shape = (size, model.config.heads, len(tables.first.cos), model.config.head_dim)
    memory = [KeyValue(first.new_zeros(shape), first.new_zeros(shape)) for _ in range(model.config.layers)]
    observed = fast_sampling.Observed(memory, *texts)
    see, know, look = compiler.function(codec), compiler.function(stages.add_proprio), compiler.function(stages.encode_fast)
    moves = fast_sampling.Moves(
        compiler.function(fast_sampling.action_step),
        compiler.function(fast_sampling.video_step),
        compiler.function(fast_sampling.watch_future),
    )

    def encode() -> None:
        know(model, inputs.proprio, texts)
        look(model, codec, inputs, tables, observed)

    def plain() -> Tensor:
        stages.add_proprio(model, inputs.proprio, texts)
        stages.encode_fast(model, codec, inputs, tables, observed)
        return stages.act_fast(model, inputs, tables, observed, options.mode, fast_sampling.PLAIN)

    return Bucket(
        size,
        inputs,
        texts,
        [None] * size,
        tables,
        memory,
        compiler.graph(lambda: see(inputs.image)),
        compiler.graph(encode),
        compiler.graph(lambda _: stages.act_fast(model, inputs, tables, observed, options.mode, moves)),
        plain,
    )
