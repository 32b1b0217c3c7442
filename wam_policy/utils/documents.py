"""Reads the documents of other people, JSON, lines of JSON and YAML, bounded in size and depth.

Every problem is an error of this package that names the file and, where there is one, the entry.
The caller says which error, and what the reader of the message should do about it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wam_policy.errors import WAMPolicyError

# Largest document, and largest line of a document of lines. A parsed document takes about ten times
# its size in memory.
MAX_BYTES = 16 * 2**20

# Largest number of values in a YAML document, those of aliases counted each time they are used.
MAX_YAML_NODES = 200_000

# Errors that code raises on a document of another form than it expects.
_FORM_ERRORS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)


@contextmanager
def explained(path: Path | str, error: type[WAMPolicyError], cure: str) -> Iterator[None]:
    """Report entries that have another form than the code expects as errors of their document.

    Args:
        path: Document, for the message.
        error: Class of the error to raise.
        cure: What to do about it.
    """
    try:
        yield
    except WAMPolicyError:
        # Errors of this package explain themselves.
        raise
    except _FORM_ERRORS as problem:
        raise error(f"{path} is incomplete or damaged ({problem!r:.300}); {cure}") from problem


def read_text(path: Path, error: type[WAMPolicyError], cure: str) -> str:
    """Read a text file: UTF-8 wherever it is read, with or without a byte order mark.

    Raises:
        WAMPolicyError: As `error`: the file is missing, unreadable, too large or not text.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as problem:
        raise error(f"{path} cannot be read ({problem}); {cure}") from problem
    if len(data) > MAX_BYTES:
        raise error(
            f"{path} is larger than {MAX_BYTES // 2**20} MiB, which no such file is; {cure}"
        )
    return _decode(data, path, error, cure)


def read_json(path: Path, error: type[WAMPolicyError], cure: str) -> Any:
    """Read a JSON document.

    Raises:
        WAMPolicyError: As `error`: the file cannot be read or is not JSON.
    """
    return _parse_json(read_text(path, error, cure), path, error, cure)


def read_json_object(path: Path, error: type[WAMPolicyError], cure: str) -> dict[str, Any]:
    """Read a JSON document that must hold an object.

    Raises:
        WAMPolicyError: As `error`: the file cannot be read or holds something else.
    """
    return _as_object(read_json(path, error, cure), path, error, cure)


def read_json_lines(
    path: Path, error: type[WAMPolicyError], cure: str, *, only_complete: bool = False
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a document with one JSON object per line; blank lines are skipped.

    Only a line feed ends a line: sentences may hold other separators, such as U+2028.

    Args:
        path: Document.
        error: Class of the error to raise.
        cure: What to do about it.
        only_complete: Leave out a last line without a line feed, which is still being written.

    Yields:
        The place of each object, "<path>, line <number>", and the object.

    Raises:
        WAMPolicyError: As `error`: the file cannot be read, or a line is not a JSON object.
    """
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_BYTES + 1):
                number += 1
                where = f"{path}, line {number}"
                if len(line) > MAX_BYTES:
                    raise error(f"{where} is longer than {MAX_BYTES // 2**20} MiB; {cure}")
                if only_complete and not line.endswith(b"\n"):
                    return
                text = _decode(line, where, error, cure).strip()
                if not text:
                    continue
                data = _parse_json(text, where, error, cure)
                yield where, _as_object(data, where, error, cure)
    except OSError as problem:
        if isinstance(problem, WAMPolicyError):
            raise
        raise error(f"{path} cannot be read ({problem}); {cure}") from problem


def read_yaml(path: Path, error: type[WAMPolicyError], cure: str) -> Any:
    """Read a YAML document as plain data: tags are refused, and aliases must not multiply.

    Raises:
        WAMPolicyError: As `error`: the file cannot be read, or holds more than bounded plain data.
    """
    import yaml

    text = read_text(path, error, cure)
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _count_nodes(node, {}) > MAX_YAML_NODES:
            raise error(f"{path} holds more than {MAX_YAML_NODES:,} values; {cure}")
        return loader.construct_document(node)
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, AttributeError) as problem:
        if isinstance(problem, WAMPolicyError):
            raise
        raise error(
            f"{path} is not plain data, and nothing in it is executed ({problem!s:.300}); {cure}"
        ) from problem


def _count_nodes(node: Any, counts: dict[int, int]) -> int:
    """Return the number of values in a YAML node, those of aliases as often as they are used.

    Args:
        node: Node of PyYAML.
        counts: Results by the identity of a node; 0 while a node is being counted.

    Raises:
        ValueError: A node holds itself.
    """
    known = counts.get(id(node))
    if known == 0:
        raise ValueError("an alias refers to a value that it stands in")
    if known is not None:
        return known

    counts[id(node)] = 0
    total = 1
    children = node.value if isinstance(node.value, list) else ()
    for child in children:
        # A mapping holds pairs of nodes, a sequence holds nodes.
        for part in child if isinstance(child, tuple) else (child,):
            total += _count_nodes(part, counts)
    counts[id(node)] = total
    return total


def _decode(data: bytes, where: Path | str, error: type[WAMPolicyError], cure: str) -> str:
    """Decode UTF-8 with or without a byte order mark."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(f"{where} is not a text file in UTF-8 ({problem}); {cure}") from problem


def _parse_json(text: str, where: Path | str, error: type[WAMPolicyError], cure: str) -> Any:
    """Parse JSON; nesting is bounded by Python's recursion limit."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise error(f"{where} is not JSON ({problem}); {cure}") from problem


def _as_object(
    data: Any, where: Path | str, error: type[WAMPolicyError], cure: str
) -> dict[str, Any]:
    """Return data that must be a JSON object."""
    if not isinstance(data, dict):
        raise error(f"{where} must hold a JSON object, got {type(data).__name__}; {cure}")
    return data
