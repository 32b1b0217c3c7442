"""The space of instructions: any sentence up to a number of bytes.

Gymnasium's own `Text` has a fixed set of characters, and an `AsyncVectorEnv` reads it out of shared
memory only once, before anything is written there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ctypes import c_uint8
from typing import Any, overload

import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import shared_memory

# Longest sentence, in bytes of UTF-8.
MAX_BYTES = 4096

# Bytes in front of a sentence in shared memory, which hold its length.
_HEADER = 4


class InstructionSpace(spaces.Text):
    """Sentences in any language.

    It has a shape and a dtype, those of a Python object, so that buffers of other libraries can
    hold sentences.
    """

    def __init__(self) -> None:
        super().__init__(MAX_BYTES, min_length=0)
        self._shape = ()
        self.dtype = np.dtype(object)

    def contains(self, x: Any) -> bool:
        """Return whether a value is a sentence that is not too long."""
        return isinstance(x, str) and len(_encode(x)) <= MAX_BYTES

    def __repr__(self) -> str:
        return "InstructionSpace()"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InstructionSpace)

    __hash__ = None  # type: ignore[assignment]


class SharedInstructions(Sequence[str]):
    """The current sentences of the sub-envs, in memory that their processes write; a copy is a
    tuple.
    """

    def __init__(self, memory: Any, count: int) -> None:
        """Look at shared memory.

        Args:
            memory: Array that `create_shared_memory` returned for an `InstructionSpace`.
            count: Number of sub-envs.
        """
        bytes_ = np.frombuffer(memory.get_obj(), np.uint8)
        self._rows = bytes_.reshape(count, _HEADER + MAX_BYTES)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...

    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        row = self._rows[index]
        length = int(row[:_HEADER].view(np.uint32)[0])
        return bytes(row[_HEADER : _HEADER + length]).decode(errors="surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def __deepcopy__(self, memo: dict[int, Any]) -> tuple[str, ...]:
        return tuple(self)

    def write(self, index: int, sentence: str) -> None:
        """Write the sentence of one sub-env."""
        data = np.frombuffer(_encode(sentence), np.uint8)
        row = self._rows[index]
        row[_HEADER : _HEADER + len(data)] = data
        row[:_HEADER].view(np.uint32)[0] = len(data)


def _encode(sentence: str) -> bytes:
    """Return the bytes of a sentence."""
    return sentence.encode(errors="surrogatepass")


@shared_memory.create_shared_memory.register(InstructionSpace)
def _create(space: InstructionSpace, n: int = 1, ctx: Any = None) -> Any:
    """Return memory for the sentences of `n` sub-envs."""
    return ctx.Array(c_uint8, n * (_HEADER + MAX_BYTES))


@shared_memory.read_from_shared_memory.register(InstructionSpace)
def _read(space: InstructionSpace, memory: Any, n: int = 1) -> SharedInstructions:
    """Return the sentences as they are whenever they are looked at."""
    return SharedInstructions(memory, n)


@shared_memory.write_to_shared_memory.register(InstructionSpace)
def _write(space: InstructionSpace, index: int, value: str, memory: Any) -> None:
    """Write the sentence of one sub-env."""
    count = len(memory.get_obj()) // (_HEADER + MAX_BYTES)
    SharedInstructions(memory, count).write(index, value)
