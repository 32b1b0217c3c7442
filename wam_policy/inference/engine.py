"""The compiled forward pass of a policy: fixed shapes, static buffers, one bucket per batch size.

`Engine` takes and returns arrays; `wam_policy.pipeline` knows observations and units of actions.
"""

# B batch, C latent channels, F latent frames, h w latent grid, H W pixels,
# T actions in a chunk, A numbers per action

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from wam_policy import sampling
from wam_policy.errors import CompileError, ConfigError, ObservationError
from wam_policy.inference.bucket import Bucket, EngineSpec, build_bucket
from wam_policy.inference.stages import StaticBuffers
from wam_policy.inference.text_cache import TextCache
from wam_policy.models.encoders.text import PromptEmbeddings
from wam_policy.models.fast_wam.model import FastWAM
from wam_policy.models.registry import Model
from wam_policy.pipeline import ModelInput
from wam_policy.sampling import SampleRequest
from wam_policy.utils.compiler import Compiler

logger = logging.getLogger(__name__)

# Prompt tokens that the text slots have room for if no known prompt is longer. LIBERO's prompts
# have 25 to 40 tokens; 43, with 3 slots for padding and 1 for proprioception, fit in 48 slots.
PROMPT_TOKENS = 43

# Largest accepted difference between compiled and uncompiled normalised actions, relative to the
# largest action but at least to 1. Compilers reorder and fuse sums, so the results differ by
# rounding that grows over blocks and denoising steps; a miscompiled kernel is off by far more.
TOLERANCE = {
    torch.float64: 1e-6,
    torch.float32: 1e-3,
    torch.bfloat16: 0.2,
    torch.float16: 0.05,
}


@dataclass
class Encoding:
    """The result of encoding one batch of observations, and the number of calls that used it."""

    size: int  # batch size of the bucket
    prompts: tuple[str, ...]
    state: Any  # result of `Bucket.encode`
    uses: int = 0


class Engine:
    """Runs the compiled functions of a model in buckets of fixed batch sizes.

    A bucket computes its constants from the weights when it is built, so the weights must not
    change afterwards; a call raises an error if they have. Calls from several threads run one
    after the other.
    """

    def __reduce__(self) -> NoReturn:
        raise CompileError(
            "a compiled policy cannot be pickled or sent to another process: send the one it was "
            "compiled from, and compile it there"
        )

    def __init__(
        self,
        spec: EngineSpec,
        prompts: PromptEmbeddings,
        compiler: Compiler,
        source: Model | None = None,
    ) -> None:
        """Prepare the engine; nothing is compiled before `warmup` or the first call.

        Args:
            spec: Parts and settings of the forward pass.
            prompts: Source of prompt embeddings.
            compiler: Compiles the functions of each bucket.
            source: Model from which `spec.model` was derived; its weights must not change either.
        """
        self.spec = spec
        self.model = spec.model
        self.options = spec.options
        self._prompts = prompts
        self._compiler = compiler
        self._lock = threading.Lock()

        longest = max((len(embedding) for embedding in prompts.table.values()), default=0)
        self.text_cache = TextCache(self.model, prompts, max(longest, PROMPT_TOKENS))
        self._buckets: dict[int, Bucket] = {}
        self._encoding: Encoding | None = None
        # The patch embedding is never quantized, so it has the device and dtype of activations.
        self._reference_weight = self.model.video.patch_embedding.weight

        self._watched_weights = list(self.model.parameters())
        if source is not None:
            self._watched_weights += source.parameters()
        self._compiled_version = self._weights_version()

    @property
    def horizon(self) -> int:
        """Actions per chunk."""
        return self.options.horizon

    # -- calls ---------------------------------------------------------------------------------

    def warmup(self) -> None:
        """Compile every batch size now and verify it on random inputs.

        Raises:
            CompileError: Compilation fails, or changes the actions, and `on_failure` is "raise".
        """
        with self._lock, torch.no_grad():
            for size in self.options.batch_sizes:
                self._verify(self.bucket(size))

    def __call__(self, inputs: ModelInput, request: SampleRequest) -> Tensor:
        """Sample normalised actions [B, T, A], float32 on the CPU.

        Raises:
            ObservationError: There are more observations than the largest bucket holds.
            ConfigError: The request has another horizon or mode than the compiled ones.
            PromptError: An instruction has no embedding and there is no text encoder.
            CompileError: The weights have changed since compilation, or compilation fails.
        """
        with self._lock, torch.no_grad():
            bucket = self.load_batch(inputs, request)
            state = self.encode_or_reuse(bucket, inputs)
            padded_actions = bucket.act(state)
            actions = _download(padded_actions.narrow(0, 0, len(inputs.prompts)))

            # A Fast-WAM has blended the target in during denoising.
            if isinstance(self.model, FastWAM):
                return actions
            return sampling.blend_target(actions, request.action_target)

    def load_batch(self, inputs: ModelInput, request: SampleRequest) -> Bucket:
        """Write a batch into the buffers of the smallest bucket that holds it; return the bucket.

        Raises:
            ObservationError: There are more observations than the largest bucket holds.
            ConfigError: The request has another horizon or mode than the compiled ones.
            PromptError: An instruction has no embedding and there is no text encoder.
            CompileError: The weights have changed since compilation.
        """
        size = len(inputs.prompts)
        self._check_request(size, request)
        if self._weights_version() != self._compiled_version:
            raise CompileError(
                "the policy's weights have changed since it was compiled; compile it again"
            )

        self._ensure_text_slots(inputs.prompts)
        fitting_sizes = (bucket for bucket in self.options.batch_sizes if bucket >= size)
        bucket = self.bucket(next(fitting_sizes))
        self._load_buffers(bucket.buffers, bucket.size - size, inputs, request)
        self._load_prompts(bucket, inputs.prompts)
        return bucket

    def reusable_encoding(self, bucket: Bucket, inputs: ModelInput) -> Encoding | None:
        """Return the encoding of an earlier observation if this batch may use it, else None.

        It may for `encode_every` calls in a row with the same bucket and prompts, provided that
        no episode begins among them.
        """
        encoding = self._encoding
        if encoding is None or inputs.episode_start.any():
            return None
        if encoding.size != bucket.size or encoding.prompts != tuple(inputs.prompts):
            return None
        if encoding.uses >= self.options.encode_every:
            return None
        return encoding

    def encode_or_reuse(self, bucket: Bucket, inputs: ModelInput) -> Any:
        """Return the argument of `bucket.act`: encoded now, or reused if that is allowed."""
        encoding = self.reusable_encoding(bucket, inputs)
        if encoding is None:
            encoding = Encoding(bucket.size, tuple(inputs.prompts), bucket.encode())
            self._encoding = encoding
        encoding.uses += 1
        return encoding.state

    def bucket(self, size: int) -> Bucket:
        """Return the bucket of a batch size, built on first use."""
        if size not in self._buckets:
            texts = self.text_cache.allocate_slots(size)
            self._buckets[size] = build_bucket(self.spec, texts, self._compiler, size)
        return self._buckets[size]

    def reset(self) -> None:
        """Drop the last encoding, so that the next call encodes its observation."""
        self._encoding = None

    # -- checks --------------------------------------------------------------------------------

    def _verify(self, bucket: Bucket) -> None:
        """Compare the compiled functions of a bucket with the same functions uncompiled.

        Compilers have bugs that change results without an error.

        Raises:
            CompileError: The actions differ and `on_failure` is "raise".
        """
        self._load_random_inputs(bucket)
        actual = bucket.act(bucket.encode()).clone()
        if self._compiler.backend is None:
            return
        expected = bucket.run_eager()

        scale = expected.abs().max().clamp(min=1)
        difference = float((actual - expected).abs().max() / scale)
        # A difference of NaN must fail, so the test asks for success: NaN compares as false.
        if difference <= TOLERANCE[self._reference_weight.dtype]:
            return

        message = (
            f"compiled and uncompiled actions differ by {difference:.1e} at batch size "
            f"{bucket.size}, a bug of the compiler"
        )
        if self._compiler.on_failure == "raise":
            raise CompileError(f"{message}; pass `on_failure='eager'` to run the policy uncompiled")
        logger.warning("%s; the policy runs uncompiled and slower", message)
        self._compiler = Compiler(None, "raise", self._reference_weight.device)
        self._drop_buckets()

    def _load_random_inputs(self, bucket: Bucket) -> None:
        """Fill a bucket with uniform numbers in [-1, 1] and, if one is known, a prompt."""
        generator = torch.Generator("cpu").manual_seed(0)
        buffers = bucket.buffers
        for buffer in (buffers.image, buffers.proprio, buffers.noise, buffers.noise_video):
            if buffer is not None:
                uniform = torch.rand(
                    buffer.shape, generator=generator, dtype=torch.float32, device="cpu"
                )
                buffer.copy_(uniform * 2 - 1)

        first_prompt = next(iter(self._prompts.table), None)
        if first_prompt is not None:
            self._load_prompts(bucket, [first_prompt])

    def _check_request(self, size: int, request: SampleRequest) -> None:
        """Check that a batch and a request match what was compiled."""
        largest = self.options.batch_sizes[-1]
        if size > largest:
            raise ObservationError(
                f"compiled for up to {largest} observations at once, got {size}; "
                f"compile with `batch_sizes=(…, {size})`"
            )

        mode = request.mode or self.options.mode
        if request.horizon != self.options.horizon or mode != self.options.mode:
            raise ConfigError(
                f"compiled for {self.options.horizon} actions in mode {self.options.mode!r}, "
                f"got a request for {request.horizon} in mode {mode!r}; compile for that, "
                f"or use the uncompiled policy"
            )

    def _weights_version(self) -> int:
        """Return a number that changes when a parameter is written to or moved.

        PyTorch does not count writes through `.data`, so these go unnoticed.
        """
        versions = [
            (weight.untyped_storage()._cdata, weight._version) for weight in self._watched_weights
        ]
        return hash(tuple(versions))

    # -- buffers -------------------------------------------------------------------------------

    def _ensure_text_slots(self, prompts: Sequence[str]) -> None:
        """Drop the buckets and allocate the longest text slots if a prompt does not fit."""
        longest = max(self.text_cache.length(prompt) for prompt in prompts)
        if longest <= self.text_cache.tokens:
            return
        logger.warning(
            "a prompt has %d tokens, but the compiled policy has room for %d; "
            "compiling again with room for the longest possible prompt",
            longest,
            self.text_cache.tokens,
        )
        self.text_cache = TextCache(self.model, self._prompts, self._prompts.token_length)
        self._drop_buckets()

    def _drop_buckets(self) -> None:
        """Drop all buckets and the encoding made by one; they are rebuilt on demand."""
        self._buckets.clear()
        self.reset()

    def _load_buffers(
        self, buffers: StaticBuffers, padding: int, inputs: ModelInput, request: SampleRequest
    ) -> None:
        """Copy a batch into static buffers.

        Args:
            buffers: Buffers to write to.
            padding: Samples to fill up by repeating the last one of the batch.
            inputs: Observations of the batch.
            request: Source of noise and action target.
        """
        _upload(buffers.image, torch.from_numpy(inputs.canvas), padding)
        if buffers.proprio is not None:
            assert inputs.proprio is not None
            _upload(buffers.proprio, torch.from_numpy(inputs.proprio), padding)

        if buffers.noise is not None:
            _upload(buffers.noise, request.noise(tuple(buffers.noise.shape[1:])), padding)

        # Noise is requested for a whole clip, as the uncompiled policy does, so that one seed
        # gives both the same numbers. The observed frame is clean and its noise goes unused.
        if buffers.noise_video is not None:
            channels, future_frames, *grid = buffers.noise_video.shape[1:]
            clip_noise = request.noise_video((channels, future_frames + 1, *grid))
            _upload(buffers.noise_video, clip_noise.narrow(2, 1, future_frames), padding)

        if buffers.target is not None:
            if request.action_target is None:
                # Zero weights leave every action free.
                buffers.target.weights.zero_()
            else:
                _upload(buffers.target.actions, request.action_target.actions, padding)
                _upload(buffers.target.weights, request.action_target.weights, padding)

    def _load_prompts(self, bucket: Bucket, prompts: Sequence[str]) -> None:
        """Write prompts into the text slots of a bucket; slots that hold theirs are skipped."""
        for sample in range(bucket.size):
            # Padding samples repeat the last prompt.
            prompt = prompts[min(sample, len(prompts) - 1)]
            entries = self.text_cache.entries(prompt)
            if bucket.entries[sample] is not entries:
                self.text_cache.write_slots(entries, bucket.texts, sample)
                bucket.entries[sample] = entries


def _upload(buffer: Tensor, values: Tensor, padding: int) -> None:
    """Copy a batch into a buffer, asynchronously if the buffer is on a GPU.

    Args:
        buffer: [B, ...] destination.
        values: [B - padding, ...] source on the CPU.
        padding: Samples to fill up by repeating the last one.
    """
    values = values.to(buffer.dtype).contiguous()
    if padding:
        repeated = values[-1:].expand(padding, *values.shape[1:])
        values = torch.cat((values, repeated))
    # Only copies from pinned memory are asynchronous.
    if buffer.device.type == "cuda":
        values = values.pin_memory()
    buffer.copy_(values, non_blocking=True)


def _download(actions: Tensor) -> Tensor:
    """Return actions as float32 on the CPU, in memory that the next call does not overwrite."""
    if actions.device.type != "cuda":
        return actions.float().clone()
    # Copy into pinned memory and wait once, for the copy and all work before it.
    host = torch.empty(actions.shape, dtype=torch.float32, device="cpu", pin_memory=True)
    host.copy_(actions.float(), non_blocking=True)
    torch.cuda.current_stream(actions.device).synchronize()
    return host
