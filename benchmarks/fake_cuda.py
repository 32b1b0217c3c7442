"""A fake CUDA device for tensors without data, on machines that have no CUDA device."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any, Self

import torch
from torch.utils.cpp_extension import include_paths, library_paths

SOURCE = Path(__file__).with_suffix(".cpp")


class Idle:
    """A stream, or an event of a stream, that never has work."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a process that computes gradients of fake CUDA tensors.

    A PyTorch with CUDA needs no change. One without CUDA looks up the device once, early in its
    start: g++ compiles a library that registers the device (this takes seconds), and the process
    loads it before PyTorch.

    Args:
        folder: Where the compiled library is written; it must exist as long as the process runs.
    """
    if torch.backends.cuda.is_built():
        return dict(os.environ)

    # Compile against the installed PyTorch.
    compile_flags = ["-shared", "-fPIC", "-std=c++20"]
    for path in include_paths():
        compile_flags.append(f"-I{path}")
    link_flags = []
    for path in library_paths():
        link_flags += [f"-L{path}", f"-Wl,-rpath,{path}"]
    link_flags += ["-ltorch_cpu", "-lc10"]

    library = folder / SOURCE.with_suffix(".so").name
    subprocess.run(
        ["g++", *compile_flags, str(SOURCE), "-o", str(library), *link_flags], check=True
    )
    return os.environ | {"LD_PRELOAD": str(library)}


def pretend() -> None:
    """Replace the CUDA streams and events of this process by idle ones if there is no device."""
    if torch.cuda.is_available():
        return
    # Through `Any`: the type checker knows these names as classes and functions.
    cuda: Any = torch.cuda
    for name in ("Stream", "Event", "stream", "current_stream"):
        setattr(cuda, name, Idle)
    cuda.current_device = lambda: 0
    cuda.device_count = lambda: 1
