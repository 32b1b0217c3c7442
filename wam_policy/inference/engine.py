"""The compiled form of a policy's forward pass: fixed shapes, memory allocated once, a graph per batch size.

`Engine` takes arrays and gives arrays; what an observation is and what actions mean is the policy's business.
"""

# B batch, H W pixels, P numbers of proprioception, T actions in a chunk, A numbers per action

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wam_policy import sampling
from wam_policy.errors import CompileError, ConfigError, ObservationError
from wam_policy.inference.bucket import Bucket, EngineSpec, build_bucket
from wam_policy.inference.text_cache import TextCache
from wam_policy.models.encoders.text import PromptEmbeddings
from wam_policy.models.fast_wam.model import FastWAM
from wam_policy.models.registry import Model
from wam_policy.pipeline import ModelInput
from wam_policy.sampling import SampleRequest
from wam_policy.utils.compiler import Compiler

logger = logging.getLogger(__name__)

PROMPT_TOKENS = 43  # room for a prompt, if no known one is longer: LIBERO's have 25 to 40
TOLERANCE = {
    torch.float64: 1e-6,
    torch.float32: 1e-3,
    torch.bfloat16: 0.2,
    torch.float16: 0.05,
}  # of an action, compiled


@dataclass
class Encoding:
    """What one encoded batch of observations leaves for the sampler, and how often it has been used."""

    size: int  # of the bucket
    prompts: tuple[str, ...]
    state: Any  # what `Bucket.encode` returned
    uses: int = 0


class Engine:
    """Runs a model's two hot functions, compiled, in buckets of batch sizes.

    What is constant is computed when a bucket is made, so weights may not change afterwards: a call then raises. Calls from
    several threads wait for each other.
    """

    def __init__(
        self,
        spec: EngineSpec,
        prompts: PromptEmbeddings,
        compiler: Compiler,
        source: Model | None = None,
    ) -> None:
        """Prepare; nothing is compiled before `warmup` or the first call.

        Args:
            spec: what is computed.
            prompts: gives embeddings.
            compiler: how it is compiled.
            source: what the model was made from; its weights may not change either.
        """
        self.spec, self.model, self.options = spec, spec.model, spec.options
        self._prompts, self._compiler, self._lock = prompts, compiler, threading.Lock()
        longest = max((len(x) for x in prompts.table.values()), default=0)
        self.text_cache = TextCache(self.model, prompts, max(longest, PROMPT_TOKENS))
        self._buckets: dict[int, Bucket] = {}
        self._encoding: Encoding | None = None
        self._like = self.model.video.patch_embedding.weight  # never quantized: device and dtype
        self._watched = [*self.model.parameters(), *(() if source is None else source.parameters())]
        self._version = self._weights_version()

    @property
    def horizon(self) -> int:
        """Actions per chunk."""
        return self.options.horizon

    # -- calls -------------------------------------------------------------------------------------------------------

    def warmup(self) -> None:
        """Compile every batch size now, and prove on random inputs that it acts as what was compiled.

        Raises:
            CompileError: it can't be compiled or acts otherwise, and `on_failure` is "raise".
        """
        with self._lock, torch.no_grad():
            for size in self.options.batch_sizes:
                self._prove(self.bucket(size))

    def _prove(self, bucket: Bucket) -> None:
        """Compare the compiled functions with themselves, not compiled: compilers have bugs."""
        generator = torch.Generator().manual_seed(0)
        for place in (
            bucket.buffers.image,
            bucket.buffers.proprio,
            bucket.buffers.noise,
            bucket.buffers.noise_video,
        ):
            if place is not None:
                place.copy_(torch.rand(place.shape, generator=generator) * 2 - 1)
        for prompt in list(self._prompts.table)[:1]:
            self._write(bucket, [prompt])
        found = bucket.act(bucket.encode()).clone()
        if self._compiler.backend is None:
            return
        expected = bucket.run_eager()
        difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1))
        if difference <= TOLERANCE[self._like.dtype]:  # never true of NaN
            return
        message = f"compiled, {bucket.size} observations at once, an action is {difference:.1e} off"
        if self._compiler.on_failure == "raise":
            raise CompileError(
                f"{message}: a bug of the compiler; run the policy uncompiled by `on_failure='eager'`"
            )
        logger.warning("%s: a bug of the compiler; the policy runs uncompiled and slower", message)
        self._compiler = Compiler(None, "raise", self._like.device)
        self._clear()

    def __call__(self, inputs: ModelInput, request: SampleRequest) -> Tensor:
        """Normalised actions [B, T, A], float32 on the CPU.

        Raises:
            ObservationError: more observations than the largest bucket holds.
            ConfigError: another horizon or mode than was compiled.
            PromptError: an instruction can't be embedded.
            CompileError: weights changed since this was made, or it can't be compiled.
        """
        with self._lock, torch.no_grad():
            bucket = self.load_batch(inputs, request)
            actions = _download(
                bucket.act(self.encode_or_reuse(bucket, inputs)).narrow(0, 0, len(inputs.prompts))
            )
            return (
                actions
                if isinstance(self.model, FastWAM)
                else sampling.blend_target(actions, request.action_target)
            )

    def load_batch(self, inputs: ModelInput, request: SampleRequest) -> Bucket:
        """The bucket of a batch, with the batch in its memory; errors are those of a call."""
        self._check(len(inputs.prompts), request)
        if self._weights_version() != self._version:
            raise CompileError(
                "the policy's weights have changed since it was compiled: compile it again"
            )
        self._make_room(inputs.prompts)
        bucket = self.bucket(
            next(size for size in self.options.batch_sizes if size >= len(inputs.prompts))
        )
        self._fill(bucket, inputs, request)
        return bucket

    def reusable_encoding(self, bucket: Bucket, inputs: ModelInput) -> Encoding | None:
        """Return the encoding of an earlier observation if it serves this batch too, else None.

        It does for `encode_every` calls in a row of the same bucket and prompts in which no episode begins.
        """
        encoding = self._encoding
        if encoding is None or inputs.episode_start.any():
            return None
        if (encoding.size, encoding.prompts) != (bucket.size, tuple(inputs.prompts)):
            return None
        return encoding if encoding.uses < self.options.encode_every else None

    def encode_or_reuse(self, bucket: Bucket, inputs: ModelInput) -> Any:
        """Return what the observation leaves for `bucket.act`: encoded now, or an earlier one's if it may be reused."""
        encoding = self.reusable_encoding(bucket, inputs)
        if encoding is None:
            encoding = Encoding(bucket.size, tuple(inputs.prompts), bucket.encode())
            self._encoding = encoding
        encoding.uses += 1
        return encoding.state

    def bucket(self, size: int) -> Bucket:
        """The bucket of a batch size, made when it is first asked for."""
        if size not in self._buckets:
            self._buckets[size] = build_bucket(
                self.spec, self.text_cache.allocate_slots(size), self._compiler, size
            )
        return self._buckets[size]

    def reset(self) -> None:
        """Forget the last observation, which `encode_every` would use again."""
        self._encoding = None

    def _check(self, size: int, request: SampleRequest) -> None:
        largest = self.options.batch_sizes[-1]
        if size > largest:
            raise ObservationError(
                f"compiled for up to {largest} observations at once, got {size}; compile with `batch_sizes=(…, {size})`"
            )
        mode = request.mode or self.options.mode
        if (request.horizon, mode) != (self.options.horizon, self.options.mode):
            raise ConfigError(
                f"compiled for {self.options.horizon} actions in mode {self.options.mode!r}, asked for {request.horizon} in mode "
                f"{mode!r}; compile for that, or ask the policy that isn't compiled"
            )

    def _weights_version(self) -> int:
        """Changes when a parameter is written or moved (but by `.data`, which PyTorch doesn't count)."""
        return hash(tuple((x.untyped_storage()._cdata, x._version) for x in self._watched))

    def _make_room(self, prompts: Sequence[str]) -> None:
        """Begin anew with longer slots if a prompt doesn't fit."""
        longest = max(self.text_cache.length(prompt) for prompt in prompts)
        if longest > self.text_cache.tokens:
            logger.warning(
                "a prompt has %d tokens, there was room for %d: compiling again, with room for all",
                longest,
                self.text_cache.tokens,
            )
            self.text_cache = TextCache(self.model, self._prompts, self._prompts.token_length)
            self._clear()

    def _clear(self) -> None:
        """Forget the buckets; they are made anew when they are needed."""
        self._buckets.clear()
        self.reset()

    def _fill(self, bucket: Bucket, inputs: ModelInput, request: SampleRequest) -> None:
        """Put a batch into a bucket's memory; the samples that are too many repeat the last one."""
        missing = bucket.size - len(inputs.prompts)
        buffers = bucket.buffers
        _upload(buffers.image, torch.from_numpy(inputs.canvas), missing)
        if buffers.proprio is not None:
            assert inputs.proprio is not None
            _upload(buffers.proprio, torch.from_numpy(inputs.proprio), missing)
        if buffers.noise is not None:
            _upload(buffers.noise, request.noise(tuple(buffers.noise.shape[1:])), missing)
        if buffers.noise_video is not None:
            channels, frames, *grid = buffers.noise_video.shape[1:]
            _upload(
                buffers.noise_video,
                request.noise_video((channels, frames + 1, *grid)).narrow(2, 1, frames),
                missing,
            )
        if buffers.target is not None and request.action_target is None:
            buffers.target.weights.zero_()
        elif buffers.target is not None and request.action_target is not None:
            for place, given in zip(buffers.target, request.action_target, strict=True):
                _upload(place, given, missing)
        self._write(bucket, inputs.prompts)

    def _write(self, bucket: Bucket, prompts: Sequence[str]) -> None:
        """Write the prompts that aren't there yet into a bucket's slots."""
        for sample in range(bucket.size):
            entries = self.text_cache.entries(prompts[min(sample, len(prompts) - 1)])
            if bucket.entries[sample] is not entries:
                self.text_cache.write_slots(entries, bucket.texts, sample)
                bucket.entries[sample] = entries


def _upload(place: Tensor, given: Tensor, missing: int) -> None:
    """Copy a batch into a bucket's memory, its last sample once more for each that is missing; asynchronously onto a GPU."""
    given = given.to(place.dtype).contiguous()
    if missing:
        given = torch.cat((given, given[-1:].expand(missing, *given.shape[1:])))
    if place.device.type == "cuda":
        given = given.pin_memory()
    place.copy_(given, non_blocking=True)


def _download(actions: Tensor) -> Tensor:
    """Actions as float32 on the CPU; from a GPU by pinned memory, waiting once."""
    if actions.device.type != "cuda":
        return actions.float().clone()
    host = torch.empty(actions.shape, dtype=torch.float32, pin_memory=True)
    host.copy_(actions.float(), non_blocking=True)
    torch.cuda.current_stream(actions.device).synchronize()
    return host
