"""Seeded damage to files and folders: flipped bits, cuts, and entries of documents replaced."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# What takes the place of an entry of a document.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 10**9, 2**31, 2**63, 2**64, 10**30, -(10**9)),
    *(0.0, -0.0, 0.5, 1e-30, 1e30, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "x", "..", "../../etc/passwd", "/etc/passwd", "~", "\x00", "\u2028", "9" * 5000),
    *([], [None], [0], [[1]], {}, {"": 0}, {"x": {"y": [1, 2, {"z": None}]}}, [0] * 10_000),
)


def copy_tree(source: Path, target: Path) -> None:
    """Copy a folder; links stay links."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)


def damage_bytes(path: Path, rng: random.Random) -> str:
    """Damage a file's bytes, and say how."""
    data = bytearray(path.read_bytes())
    kind = rng.choice(("flip", "flip", "flip", "cut", "zero", "insert", "drop", "repeat", "empty"))
    at = rng.randrange(max(1, len(data)))
    length = rng.choice((1, 2, 8, 64, 1024))
    if kind == "flip" and data:
        # Headers, at the beginning and the end, are hit as often as the rest.
        end = len(data) - 1
        at = min(end, rng.choice((at, rng.randrange(min(len(data), 400)), max(0, end - at % 200))))
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[at:]
    elif kind == "zero":
        data[at : at + length] = bytes(len(data[at : at + length]))
    elif kind == "insert":
        data[at:at] = rng.randbytes(length)
    elif kind == "drop":
        del data[at : at + length]
    elif kind == "repeat":
        data[at:at] = data[at : at + length]
    elif kind == "empty":
        data.clear()
    path.write_bytes(data)
    return f"{kind} at {at} of {path.name}"


def damage_file(path: Path, rng: random.Random) -> str:
    """Remove a file or put something else in its place, and say what."""
    kind = rng.choice(("remove", "folder", "link", "other"))
    others = [other for other in path.parent.iterdir() if other.is_file() and other != path]
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("nowhere")
    elif kind == "other" and others:
        shutil.copy(rng.choice(others), path)
    return f"{kind} {path.name}"


def entries(data: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the containers of a document and the keys in them."""
    pairs = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in list(pairs):
        yield data, key
        if isinstance(value, (dict, list)):
            yield from entries(value)


def damage_document(data: Any, rng: random.Random) -> tuple[str, bool]:
    """Replace, remove or rename an entry of a document in place.

    Returns:
        What was done, and whether a valid document might look so too: a number took the place of a
        number or a sentence that of a sentence, or an entry is gone, which may have been optional.
    """
    container, key = rng.choice(list(entries(data)))
    old = container[key]
    kind = rng.choice(("value", "value", "value", "remove", "rename", "deep"))
    if kind == "value":
        new = rng.choice(VALUES)
        container[key] = new
        if new is None or new in ([], {}):
            return f"{key}: {old!r:.40} -> {new}", True
        numbers = isinstance(old, (int, float)) and isinstance(new, (int, float))
        texts = isinstance(old, str) and isinstance(new, str)
        return f"{key}: {old!r:.40} -> {new!r:.40}", numbers or texts
    if kind == "deep":
        for _ in range(rng.choice((10, 100))):
            old = [old]
        container[key] = old
    elif kind == "rename" and isinstance(container, dict):
        container[f"{key}_"] = container.pop(key)
    else:
        del container[key]
    return f"{kind} {key}", kind != "deep"


def damage_json(path: Path, rng: random.Random) -> tuple[str, bool]:
    """Damage the document in a JSON file; see `damage_document`."""
    data = json.loads(path.read_text(encoding="utf-8"))
    done, is_plausible = damage_document(data, rng)
    path.write_text(json.dumps(data), encoding="utf-8")
    return f"{path.name}: {done}", is_plausible


@dataclass(frozen=True)
class Damage:
    """What was done to a file.

    Attributes:
        what: The damage in words.
        kind: Whether it was done to the whole file, to an entry of its content, or to its bytes.
        is_plausible: Whether a valid document might look so too; told for entries only.
    """

    what: str
    kind: Literal["file", "entry", "bytes"]
    is_plausible: bool = False


def damaged_copies(
    base: Path,
    folder: Path,
    count: int,
    rng: random.Random,
    entries: Mapping[str, Callable[[Path, random.Random], tuple[str, bool]]],
) -> Iterator[tuple[Path, Damage]]:
    """Yield, one after the other, copies of a folder in which one file is damaged.

    Args:
        base: Folder to copy.
        folder: Where the copies lie, each in the place of the one before.
        count: How many there are.
        rng: Chooses file and damage.
        entries: By a file's suffix, what damages an entry of its content; it returns what was done,
            and whether a valid document might look so too.

    Yields:
        The damaged file, and the damage.
    """
    files = sorted(path.relative_to(base) for path in base.rglob("*") if path.is_file())
    for _ in range(count):
        copy_tree(base, folder)
        path = folder / rng.choice(files)
        choice = rng.random()
        if choice < 0.1:
            damage = Damage(damage_file(path, rng), "file")
        elif choice < 0.6 and path.suffix in entries:
            what, is_plausible = entries[path.suffix](path, rng)
            damage = Damage(what, "entry", is_plausible)
        else:
            damage = Damage(damage_bytes(path, rng), "bytes")
        yield path, damage
