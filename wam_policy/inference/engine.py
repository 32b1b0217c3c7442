"""The compiled form of a policy's forward pass: fixed shapes, memory allocated once, a graph per batch size.

`Engine` takes arrays and gives arrays; what an observation is and what actions mean is the policy's business.
"""

# B batch, H W pixels, P numbers of proprioception, T actions in a chunk, A numbers per action

from __future__ import annotations

import logging
import os
import threading
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from wam_policy import acting, images
from wam_policy.config import PolicyConfig
from wam_policy.errors import CompileError, ConfigError, ObservationError
from wam_policy.inference import hot
from wam_policy.inference.text import Entry, TextCache
from wam_policy.models import sampling
from wam_policy.models.build import Model
from wam_policy.models.fast_wam import FastWAM
from wam_policy.models.layers import KeyValue, Rope, Text
from wam_policy.models.light_wam import LightWAM
from wam_policy.models.state_fusion import Taps
from wam_policy.models.text import Prompts
from wam_policy.models.variants import ActionMode

logger = logging.getLogger(__name__)

Backend = str | Callable[..., object]
T = TypeVar("T")
PROMPT_TOKENS = 43  # room for a prompt, if no known one is longer: LIBERO's have 25 to 40
WARMUPS = 3  # runs before a CUDA graph is captured
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}  # of an action, compiled


class Options(NamedTuple):
    """How a policy is compiled."""

    mode: ActionMode
    horizon: int  # actions per chunk
    batch_sizes: tuple[int, ...]  # rising
    backend: Backend | None  # of `torch.compile`; None: the same functions, not compiled
    on_failure: Literal["raise", "eager"]
    encode_every: int = 1  # calls that one observation's encoding serves


@dataclass
class Bucket:
    """One batch size: its memory and its two functions over it."""

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


class Engine:
    """Runs a model's two hot functions, compiled, in buckets of batch sizes.

    What is constant is computed when a bucket is made, so weights may not change afterwards: a call then raises. Calls from
    several threads wait for each other.
    """

    def __init__(
        self,
        config: PolicyConfig,
        model: Model,
        encode_first_frame: hot.Codec,
        prompts: Prompts,
        frames: int,
        options: Options,
        source: Model | None = None,
    ) -> None:
        """Prepare; nothing is compiled before `warmup` or the first call.

        Args:
            config: the contract.
            model: a Fast-WAM, best with fused projections, or a lean Light-WAM.
            encode_first_frame: the codec, on the model's device.
            prompts: gives embeddings.
            frames: latent frames of a clip.
            options: how.
            source: what the model was made from; its weights may not change either.
        """
        self.config, self.model, self.codec, self.frames, self.options = config, model, encode_first_frame, frames, options
        self._prompts, self._lock = prompts, threading.Lock()
        longest = max((len(x) for x in prompts.table.values()), default=0)
        self._text = TextCache(model, prompts, max(longest, PROMPT_TOKENS))
        self._buckets: dict[int, Bucket] = {}
        self._encoded: tuple[Any, int, Any] = (None, 0, None)  # of which batch, how often it was used, what it left
        self._like = model.video.patch_embedding.weight  # never quantized: device and dtype
        self._watched = [*model.parameters(), *(() if source is None else source.parameters())]
        self._version = self._weights_version()
        self._pool: Any = None  # memory of the CUDA graphs

    # -- calls -------------------------------------------------------------------------------------------------------

    def warmup(self) -> None:
        """Compile every batch size now, and prove on random inputs that it acts as what was compiled.

        Raises:
            CompileError: it can't be compiled or acts otherwise, and `on_failure` is "raise".
        """
        with self._lock, torch.no_grad():
            for size in self.options.batch_sizes:
                self._prove(self._bucket(size))

    def _prove(self, bucket: Bucket) -> None:
        """Compare the compiled functions with themselves, not compiled: compilers have bugs."""
        generator = torch.Generator().manual_seed(0)
        for place in (bucket.inputs.image, bucket.inputs.proprio, bucket.inputs.noise, bucket.inputs.noise_video):
            if place is not None:
                place.copy_(torch.rand(place.shape, generator=generator) * 2 - 1)
        for prompt in list(self._prompts.table)[:1]:
            self._write(bucket, [prompt])
        found = bucket.act(bucket.encode()).clone()
        if self.options.backend is None:
            return
        expected = bucket.plain()
        difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1))
        if difference <= TOLERANCE[self._like.dtype]:  # never true of NaN
            return
        message = f"compiled, {bucket.size} observations at once, an action is {difference:.1e} off"
        if self.options.on_failure == "raise":
            raise CompileError(f"{message}: a bug of the compiler; run the policy uncompiled by `on_failure='eager'`")
        logger.warning("%s: a bug of the compiler; the policy runs uncompiled and slower", message)
        self.options = self.options._replace(backend=None)
        self._clear()

    def __call__(self, seen: acting.Seen, wish: acting.Wish) -> Tensor:
        """Normalised actions [B, T, A], float32 on the CPU.

        Raises:
            ObservationError: more observations than the largest bucket holds.
            ConfigError: another horizon or mode than was compiled.
            PromptError: an instruction can't be embedded.
            CompileError: weights changed since this was made, or it can't be compiled.
        """
        with self._lock, torch.no_grad():
            bucket = self.load(seen, wish)
            actions = _download(bucket.act(self.state(bucket, seen)).narrow(0, 0, len(seen.prompts)))
            return actions if isinstance(self.model, FastWAM) else acting.blended(actions, wish.known)

    def load(self, seen: acting.Seen, wish: acting.Wish) -> Bucket:
        """The bucket of a batch, with the batch in its memory; errors are those of a call."""
        self._check(len(seen.prompts), wish)
        if self._weights_version() != self._version:
            raise CompileError("the policy's weights have changed since it was compiled: compile it again")
        self._make_room(seen.prompts)
        bucket = self._bucket(next(size for size in self.options.batch_sizes if size >= len(seen.prompts)))
        self._fill(bucket, seen, wish)
        return bucket

    def state(self, bucket: Bucket, seen: acting.Seen) -> Any:
        """What the observation leaves for `act`; an earlier one's, where not every observation is to be encoded."""
        same = (bucket.size, tuple(seen.prompts))
        if seen.starts.any() or self._encoded[0] != same or self._encoded[1] >= self.options.encode_every:
            self._encoded = (same, 0, bucket.encode())
        self._encoded = (same, self._encoded[1] + 1, self._encoded[2])
        return self._encoded[2]

    def _check(self, size: int, wish: acting.Wish) -> None:
        largest = self.options.batch_sizes[-1]
        if size > largest:
            raise ObservationError(
                f"compiled for up to {largest} observations at once, got {size}; compile with `batch_sizes=(…, {size})`"
            )
        mode = wish.mode or self.options.mode
        if (wish.horizon, mode) != (self.options.horizon, self.options.mode):
            raise ConfigError(
                f"compiled for {self.options.horizon} actions in mode {self.options.mode!r}, asked for {wish.horizon} in mode "
                f"{mode!r}; compile for that, or ask the policy that isn't compiled"
            )

    def _weights_version(self) -> int:
        """Changes when a parameter is written or moved (but by `.data`, which PyTorch doesn't count)."""
        return hash(tuple((parameter.data_ptr(), parameter._version) for parameter in self._watched))

    def _make_room(self, prompts: Sequence[str]) -> None:
        """Begin anew with longer slots if a prompt doesn't fit."""
        longest = max(self._text.length(prompt) for prompt in prompts)
        if longest > self._text.tokens:
            logger.warning(
                "a prompt has %d tokens, there was room for %d: compiling again, with room for all", longest, self._text.tokens
            )
            self._text = TextCache(self.model, self._prompts, self._prompts.token_length)
            self._clear()

    def _clear(self) -> None:
        """Forget the buckets; they are made anew when they are needed."""
        self._buckets.clear()
        self._encoded = (None, 0, None)

    def _fill(self, bucket: Bucket, seen: acting.Seen, wish: acting.Wish) -> None:
        """Put a batch into a bucket's memory; the samples that are too many repeat the last one."""
        missing = bucket.size - len(seen.prompts)
        inputs = bucket.inputs
        _upload(inputs.image, torch.from_numpy(seen.canvas), missing)
        if inputs.proprio is not None:
            assert seen.proprio is not None
            _upload(inputs.proprio, torch.from_numpy(seen.proprio), missing)
        if inputs.noise is not None:
            _upload(inputs.noise, wish.noise(tuple(inputs.noise.shape[1:])), missing)
        if inputs.noise_video is not None:
            channels, frames, *grid = inputs.noise_video.shape[1:]
            _upload(inputs.noise_video, wish.noise_video((channels, frames + 1, *grid)).narrow(2, 1, frames), missing)
        if inputs.known is not None and wish.known is None:
            inputs.known.weights.zero_()
        elif inputs.known is not None and wish.known is not None:
            for place, given in zip(inputs.known, wish.known, strict=True):
                _upload(place, given, missing)
        self._write(bucket, seen.prompts)

    def _write(self, bucket: Bucket, prompts: Sequence[str]) -> None:
        """Write the prompts that aren't there yet into a bucket's slots."""
        for sample in range(bucket.size):
            entries = self._text.entries(prompts[min(sample, len(prompts) - 1)])
            if bucket.entries[sample] is not entries:
                self._text.put(entries, bucket.texts, sample)
                bucket.entries[sample] = entries

    # -- buckets -----------------------------------------------------------------------------------------------------

    def _bucket(self, size: int) -> Bucket:
        if size not in self._buckets:
            self._buckets[size] = self._build(size)
        return self._buckets[size]

    def _build(self, size: int) -> Bucket:
        """Allocate a bucket and compute what is constant in it."""
        like, state = self._like, self.config.state
        image = like.new_zeros(size, 3, *images.canvas_size(self.config.cameras))
        proprio = None if state is None else like.new_zeros(size, len(state.names))
        build = self._fast_bucket if isinstance(self.model, FastWAM) else self._light_bucket
        return build(hot.Inputs(image, proprio), self._text.empty(size))

    def _light_bucket(self, inputs: hot.Inputs, texts: list[Text]) -> Bucket:
        model, codec, horizon = self.model, self.codec, self.options.horizon
        assert isinstance(model, LightWAM)
        rope = model.video.rope(codec(inputs.image))
        see, know = self._compiled(codec), self._compiled(hot.add_proprio)
        look, act = self._compiled(hot.encode_light), self._compiled(hot.act_light)

        def encode() -> Taps:
            know(model, inputs.proprio, texts)
            return look(model, codec, inputs, rope, texts[0])

        def plain() -> Tensor:
            hot.add_proprio(model, inputs.proprio, texts)
            return hot.act_light(model, hot.encode_light(model, codec, inputs, rope, texts[0]), horizon)

        return Bucket(
            len(inputs.image),
            inputs,
            texts,
            [None] * len(inputs.image),
            rope,
            [],
            self._graph(lambda: see(inputs.image)),
            self._graph(encode),
            self._graph(lambda taps: act(model, taps, horizon)),
            plain,
        )

    def _fast_bucket(self, inputs: hot.Inputs, texts: list[Text]) -> Bucket:
        model, codec, options, size = self.model, self.codec, self.options, len(inputs.image)
        assert isinstance(model, FastWAM)
        first, time = codec(inputs.image), acting.time_dtype(model)
        frames = self.frames if options.mode != "first_frame" else 1
        action, video = (acting.schedule(self.config, model, shift) for shift in (self.config.sampling.action_shift, None))
        tables = sampling.tables(model, first, frames, options.horizon, action, video)
        noise = first.new_zeros((size, options.horizon, self.config.action.layout.dim), dtype=time)
        known = sampling.Known(torch.zeros_like(noise), noise.new_zeros(size, options.horizon, 1))
        future = None if frames == 1 else first.new_zeros((*first.shape[:2], frames - 1, *first.shape[3:]), dtype=time)
        inputs = inputs._replace(noise=noise, known=known, noise_video=future)
        shape = (size, model.config.heads, len(tables.first.cos), model.config.head_dim)
        memory = [KeyValue(first.new_zeros(shape), first.new_zeros(shape)) for _ in range(model.config.layers)]
        observed = sampling.Observed(memory, *texts)
        see, know, look = self._compiled(codec), self._compiled(hot.add_proprio), self._compiled(hot.encode_fast)
        moves = sampling.Moves(
            self._compiled(sampling.action_step),
            self._compiled(sampling.video_step),
            self._compiled(sampling.watch_future),
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
            self._graph(lambda: see(inputs.image)),
            self._graph(encode),
            self._graph(lambda _: hot.act_fast(model, inputs, tables, observed, options.mode, moves)),
            plain,
        )

    def _compiled(self, function: Callable[..., T]) -> Callable[..., T]:
        """A function of fixed shapes, compiled when it is first called."""
        if self.options.backend is None:
            return function
        _keep_compiled_code()
        own = _own_code(function)
        run: Callable[..., T] = torch.compile(own, fullgraph=True, dynamic=False, backend=self.options.backend)
        ready = False

        def checked(*arguments: Any, **options: Any) -> T:
            nonlocal run, ready
            if ready:
                return run(*arguments, **options)
            try:
                result = run(*arguments, **options)
            except Exception as error:
                if self.options.on_failure == "raise":
                    raise CompileError(
                        f"the policy can't be compiled: {error}\n"
                        f"Install a C++ compiler (apt-get install g++), or run it uncompiled by `on_failure='eager'`"
                    ) from error
                logger.warning("compiling failed, the policy runs uncompiled and slower: %s", error)
                run, result = function, function(*arguments, **options)
            ready = True
            return result

        return checked

    def _graph(self, function: Callable[..., T]) -> Callable[..., T]:
        """On CUDA, a function of always the same tensors as one CUDA graph, captured when it is first called."""
        if self.options.backend is None or self._like.device.type != "cuda":
            return function
        replay: Callable[..., T] | None = None

        def graphed(*arguments: Any) -> T:
            nonlocal replay
            try:
                replay = replay or self._captured(function, arguments)
            except RuntimeError as error:
                if self.options.on_failure == "raise":
                    raise CompileError(f"no CUDA graph could be captured: {error}") from error
                logger.warning("no CUDA graph could be captured, the policy runs without and slower: %s", error)
                replay = function
            return replay(*arguments)

        return graphed

    def _captured(self, run: Callable[..., T], arguments: tuple[Any, ...]) -> Callable[..., T]:
        """A compiled function as one CUDA graph, which reads and returns always the same tensors."""
        with torch.cuda.device(self._like.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARMUPS):
                    run(*arguments)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = run(*arguments)

        def replay(*_: Any) -> T:
            graph.replay()
            return result

        return replay


def _own_code(function: Callable[..., T]) -> Callable[..., T]:
    """The same function with a code object of its own: `torch.compile` counts recompilations by those."""
    if not isinstance(function, types.FunctionType):
        return function
    code = function.__code__.replace()
    own = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    return own


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


def _keep_compiled_code() -> None:
    """Let compiled code outlive this machine's start, if nothing else is said: PyTorch's own place is a temporary folder."""
    place = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "wam-policy" / "inductor"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(place))
