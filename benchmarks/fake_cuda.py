"""A CUDA device for tensors without numbers, where there is none: its library, its streams."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any, Self

import torch
from torch.utils.cpp_extension import include_paths, library_paths

SOURCE = Path(__file__).with_suffix(".cpp")


class Idle:
    """A stream, or an event of one, that never has work."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def environment(folder: Path) -> dict[str, str]:
    """What a process needs in its environment to compute gradients of fake CUDA tensors.

    A PyTorch with CUDA needs nothing more. One without it asks, once and early, for a library that registers the device: it is
    compiled (g++, seconds) into `folder` and loaded before PyTorch.
    """
    if torch.backends.cuda.is_built():
        return dict(os.environ)
    library = folder / SOURCE.with_suffix(".so").name
    words = ["-shared", "-fPIC", "-std=c++20", *(f"-I{path}" for path in include_paths())]
    places = [word for path in library_paths() for word in (f"-L{path}", f"-Wl,-rpath,{path}")]
    subprocess.run(
        ["g++", *words, str(SOURCE), "-o", str(library), *places, "-ltorch_cpu", "-lc10"],
        check=True,
    )
    return os.environ | {"LD_PRELOAD": str(library)}


def pretend() -> None:
    """Streams and events for a process without a CUDA device."""
    if torch.cuda.is_available():
        return
    cuda: Any = torch.cuda
    cuda.Stream = cuda.Event = cuda.stream = cuda.current_stream = Idle
    cuda.current_device, cuda.device_count = lambda: 0, lambda: 1
