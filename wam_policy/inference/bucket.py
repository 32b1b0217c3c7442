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
from wam_policy.inference.text_cache import TextEntry
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


class EngineSpec(NamedTuple):
    """What is the same in every bucket."""

    config: PolicyConfig
    model: Model  # a Fast-WAM, best with fused projections, or a lean Light-WAM
    image_encoder: stages.ImageEncoder  # on the model's device
    frames: int  # latent frames of a clip
    options: Options


@dataclass
class Bucket:
    """One batch size."""

    size: int
    buffers: stages.StaticBuffers
    texts: list[Text]
    entries: list[list[TextEntry] | None]  # what is in each sample's slots
    constants: fast_sampling.SamplerConstants | Rope
    video_kv: list[
        KeyValue
    ]  # of the observed frame, written by `encode`; a Light-WAM's `encode` returns what it leaves
    encode_image: Callable[
        [], Tensor
    ]  # latents of the picture, what `encode` begins with; to be measured alone
    encode: Callable[[], Any]  # what it returns is for `act`
    act: Callable[[Any], Tensor]  # normalised actions [B, T, A]
    run_eager: Callable[[], Tensor]  # both, not compiled, on the same memory


def build_bucket(spec: EngineSpec, texts: list[Text], compiler: Compiler, size: int) -> Bucket:
    """Allocate a bucket and compute what is constant in it; its functions are compiled when they are first called.

    Args:
        spec: what it computes.
        texts: a text of each expert with empty slots for every sample.
        compiler: how it is compiled.
        size: B.
    """
    like, config = (
        spec.model.video.patch_embedding.weight,
        spec.config,
    )  # never quantized: device and dtype
    image = like.new_zeros(size, 3, *images.canvas_size(config.cameras))
    proprio = None if config.state is None else like.new_zeros(size, len(config.state.names))
    make = _fast if isinstance(spec.model, FastWAM) else _light
    return make(spec, stages.StaticBuffers(image, proprio), texts, compiler)


def _light(
    forward: EngineSpec, inputs: stages.StaticBuffers, texts: list[Text], compiler: Compiler
) -> Bucket:
    _, model, codec, _, options = forward
    assert isinstance(model, LightWAM)
    size, horizon, rope = len(inputs.image), options.horizon, model.video.rope(codec(inputs.image))
    see, know = compiler.compile(codec), compiler.compile(stages.add_proprio)
    look, act = compiler.compile(stages.encode_light), compiler.compile(stages.act_light)

    def encode() -> Taps:
        know(model, inputs.proprio, texts)
        return look(model, codec, inputs, rope, texts[0])

    def plain() -> Tensor:
        stages.add_proprio(model, inputs.proprio, texts)
        return stages.act_light(
            model, stages.encode_light(model, codec, inputs, rope, texts[0]), horizon
        )

    return Bucket(
        size,
        inputs,
        texts,
        [None] * size,
        rope,
        [],
        compiler.capture(lambda: see(inputs.image)),
        compiler.capture(encode),
        compiler.capture(lambda taps: act(model, taps, horizon)),
        plain,
    )


def _fast(
    forward: EngineSpec, inputs: stages.StaticBuffers, texts: list[Text], compiler: Compiler
) -> Bucket:
    config, model, codec, frames, options = forward
    assert isinstance(model, FastWAM)
    size, first, time = len(inputs.image), codec(inputs.image), sampling.sampling_dtype(model)
    frames = 1 if options.mode == "first_frame" else frames
    action, video = (
        sampling.sampler_schedule(config, model, shift)
        for shift in (config.sampling.action_shift, None)
    )
    tables = fast_sampling.make_sampler_constants(
        model, first, frames, options.horizon, action, video
    )
    noise = first.new_zeros((size, options.horizon, config.action.layout.dim), dtype=time)
    known = fast_sampling.NormalizedTarget(
        torch.zeros_like(noise), noise.new_zeros(size, options.horizon, 1)
    )
    future = (
        None
        if frames == 1
        else first.new_zeros((*first.shape[:2], frames - 1, *first.shape[3:]), dtype=time)
    )
    inputs = inputs._replace(noise=noise, target=known, noise_video=future)
    shape = (size, model.config.heads, len(tables.first_frame_rope.cos), model.config.head_dim)
    memory = [
        KeyValue(first.new_zeros(shape), first.new_zeros(shape)) for _ in range(model.config.layers)
    ]
    observed = fast_sampling.PrefillCache(memory, *texts)
    see, know, look = (
        compiler.compile(codec),
        compiler.compile(stages.add_proprio),
        compiler.compile(stages.encode_fast),
    )
    moves = fast_sampling.SamplerSteps(
        compiler.compile(fast_sampling.action_step),
        compiler.compile(fast_sampling.video_step),
        compiler.compile(fast_sampling.encode_future),
    )

    def encode() -> None:
        know(model, inputs.proprio, texts)
        look(model, codec, inputs, tables, observed)

    def plain() -> Tensor:
        stages.add_proprio(model, inputs.proprio, texts)
        stages.encode_fast(model, codec, inputs, tables, observed)
        return stages.act_fast(
            model, inputs, tables, observed, options.mode, fast_sampling.EAGER_STEPS
        )

    return Bucket(
        size,
        inputs,
        texts,
        [None] * size,
        tables,
        memory,
        compiler.capture(lambda: see(inputs.image)),
        compiler.capture(encode),
        compiler.capture(
            lambda _: stages.act_fast(model, inputs, tables, observed, options.mode, moves)
        ),
        plain,
    )
