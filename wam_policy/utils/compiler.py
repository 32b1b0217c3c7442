"""Compiles functions of fixed shapes, and on CUDA captures what always runs on the same tensors as a graph."""

from __future__ import annotations

import logging
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from wam_policy.errors import CompileError

logger = logging.getLogger(__name__)

Backend = str | Callable[..., object]
T = TypeVar("T")
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
WARMUPS = 3  # runs before a CUDA graph is captured


class Compiler:
    """How functions are compiled; its CUDA graphs share their memory."""

    def __init__(
        self, backend: Backend | None, on_failure: Literal["raise", "eager"], device: torch.device
    ) -> None:
        """Choose how.

        Args:
            backend: of `torch.compile`; None: functions stay as they are.
            on_failure: where something can't be compiled: a `CompileError`, or a warning and the function as it is.
            device: where the functions' tensors are.
        """
        self.backend, self.on_failure, self.device = backend, on_failure, device
        self._pool: Any = None  # memory of the CUDA graphs

    def compile(self, function: Callable[..., T]) -> Callable[..., T]:
        """A function of fixed shapes, compiled when it is first called."""
        if self.backend is None:
            return function
        persist_compile_cache()
        own = with_own_code(function)
        run: Callable[..., T] = torch.compile(
            own, fullgraph=True, dynamic=False, backend=self.backend
        )
        ready = False

        def checked(*arguments: Any, **options: Any) -> T:
            nonlocal run, ready
            if ready:
                return run(*arguments, **options)
            try:
                result = run(*arguments, **options)
            except Exception as error:
                if self.on_failure == "raise":
                    raise CompileError(
                        f"the policy can't be compiled: {error}\n"
                        f"Install a C++ compiler (apt-get install g++), or run it uncompiled by `on_failure='eager'`"
                    ) from error
                logger.warning("compiling failed, the policy runs uncompiled and slower: %s", error)
                run, result = function, function(*arguments, **options)
            ready = True
            return result

        return checked

    def capture(self, function: Callable[..., T]) -> Callable[..., T]:
        """On CUDA, a function of always the same tensors as one CUDA graph, captured when it is first called."""
        if self.backend is None or self.device.type != "cuda":
            return function
        replay: Callable[..., T] | None = None

        def graphed(*arguments: Any) -> T:
            nonlocal replay
            try:
                replay = replay or self._captured(function, arguments)
            except RuntimeError as error:
                if self.on_failure == "raise":
                    raise CompileError(f"no CUDA graph could be captured: {error}") from error
                logger.warning(
                    "no CUDA graph could be captured, the policy runs without and slower: %s", error
                )
                replay = function
            return replay(*arguments)

        return graphed

    def _captured(self, run: Callable[..., T], arguments: tuple[Any, ...]) -> Callable[..., T]:
        """A compiled function as one CUDA graph, which reads and returns always the same tensors."""
        with torch.cuda.device(self.device):
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


def with_own_code(function: Callable[..., T]) -> Callable[..., T]:
    """The same function with a code object of its own: `torch.compile` counts recompilations by those."""
    if not isinstance(function, types.FunctionType):
        return function
    code = function.__code__.replace()
    own = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return own


def persist_compile_cache() -> None:
    """Let compiled code outlive this machine's start, if nothing else is said: PyTorch's own place is a temporary folder."""
    place = (
        Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "wam-policy" / "inductor"
    )
    usual = (
        default_cache_dir()
    )  # which PyTorch has put into the environment, as soon as it was imported
    if os.environ.get(CACHE_VARIABLE, usual) == usual:
        os.environ[CACHE_VARIABLE] = str(place)
