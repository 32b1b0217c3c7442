"""Turns a loaded policy into its compiled form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Protocol, Self, TypeVar

from wam_policy import pipeline
from wam_policy.config import PolicyConfig
from wam_policy.errors import ConfigError
from wam_policy.inference.bucket import EngineSpec, Options
from wam_policy.inference.engine import Engine
from wam_policy.inference.weight_transforms import Quantization, fuse_projections, quantize_linears
from wam_policy.models.fast_wam.model import FastWAM
from wam_policy.models.fast_wam.variants import ActionMode
from wam_policy.models.light_wam.fold import fold_to_lean
from wam_policy.models.light_wam.model import LightWAM
from wam_policy.pipeline import PolicyLike
from wam_policy.utils.compiler import Backend, Compiler


class CompilablePolicy(PolicyLike, Protocol):
    """A policy that can act by a compiled engine; `WAMPolicy` is one."""

    def with_engine(self, config: PolicyConfig, engine: Engine) -> Self:
        """Return a policy with the same parts that acts by the engine."""


PolicyT = TypeVar("PolicyT", bound=CompilablePolicy)


def compile_inference(
    policy: PolicyT,
    *,
    mode: ActionMode | None = None,
    batch_sizes: Sequence[int] = (1, 2, 4, 8),
    horizon: int | None = None,
    warmup: bool = True,
    backend: Backend | None = "inductor",
    on_failure: Literal["raise", "eager"] = "raise",
    steps: int | None = None,
    quantize: Quantization | None = None,
    encode_every: int = 1,
) -> PolicyT:
    """The same policy with a compiled forward pass: same observations in, same chunks out, up to rounding.

    It computes once what is constant (text, modulations, rotary tables, a Light-WAM's folded weights), in memory that is
    allocated once, in two functions of fixed shape: encode the observation, act. On CUDA each is one CUDA graph. Imagining and
    explaining are done by the plain forward pass.

    Args:
        policy: the policy; it shares its weights with what is returned (but for what a Light-WAM folds).
        mode: what the actions see while they are denoised; the default is the contract's.
        batch_sizes: each is compiled for itself; a batch in between is filled up to the next one.
        horizon: actions per chunk; the default is the contract's.
        warmup: compile now, and prove on random inputs that the compiled functions give what they give uncompiled; else each
            batch size is compiled when it is first asked for.
        backend: of `torch.compile`; None: the same functions without compiling them.
        on_failure: what happens where something can't be compiled: an error, or a warning and the functions uncompiled.
        steps: denoising steps, if not the contract's. This and the following change the actions; `wam bench` tells by how much.
        quantize: of linear layers, by torchao; the default is none.
        encode_every: so many calls are served by one observation: the video expert's view of it, and of the state, is then old
            in all but the first. A new episode or instruction is always encoded; the calls must be of the same envs.

    Raises:
        ConfigError: no batch sizes, a mode that the variant wasn't trained for.
        CompileError: it can't be compiled here.
    """
    spec, sizes = policy.config, tuple(sorted(set(batch_sizes)))
    if not sizes or sizes[0] < 1:
        raise ConfigError(f"`batch_sizes` must be positive, got {list(batch_sizes)}")
    if encode_every < 1:
        raise ConfigError(f"`encode_every` must be positive, got {encode_every}")
    if steps is not None:
        if spec.sampling.action_shift is None:
            raise ConfigError("a Light-WAM reads its actions off in one pass: it has no `steps`")
        spec = replace(spec, sampling=replace(spec.sampling, steps=steps))
    length, model = pipeline.chunk_length(policy, horizon), policy.model
    if isinstance(model, LightWAM) and model.config.lean_steps is None:
        model = fold_to_lean(model, length)
    if quantize is not None:
        model = quantize_linears(model, quantize)
    elif isinstance(model, FastWAM):
        model = fuse_projections(model)
    vae = policy.vae
    _ = vae.first_frame_encoder  # made now, not while it is compiled
    options = Options(spec.action_mode(mode), length, sizes, encode_every)
    forward = EngineSpec(
        spec,
        model,
        lambda image: vae.encode_first_frame(image),
        pipeline.latent_frames(policy),
        options,
    )
    engine = Engine(
        forward, policy.prompts, Compiler(backend, on_failure, policy.device), policy.model
    )
    if warmup:
        engine.warmup()
    return policy.with_engine(spec, engine)
