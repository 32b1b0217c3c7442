"""SHA-256 of the files of a checkpoint, in the file `SHA256SUMS` beside them.

The format is that of the command `sha256sum`, which can verify it too: `sha256sum -c SHA256SUMS`.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from wam_policy.errors import CheckpointError
from wam_policy.utils import documents

SUMS = "SHA256SUMS"

# Files that do not change what a policy does.
CARDS = ("README.md", SUMS)

_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def write(folder: Path) -> None:
    """Write the SHA-256 of every file of a new checkpoint but the card, which people edit."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in CARDS)
    lines = [f"{file_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def verify(folder: Path) -> int:
    """Compare the files of a checkpoint with their recorded SHA-256.

    Args:
        folder: Folder of the checkpoint.

    Returns:
        Number of files that were compared.

    Raises:
        CheckpointError: No sums are recorded, or a file is missing or has changed; the message
            names the files.
    """
    sums = read(folder)
    changed = []
    for name, sha256 in sums.items():
        path = folder / name
        if not path.is_file() or file_sha256(path) != sha256:
            changed.append(name)
    if changed:
        raise CheckpointError(
            f"{folder}: {', '.join(changed[:5])} missing or changed since the checkpoint was saved "
            f"({len(changed)} of {len(sums)} files, by {SUMS}); download or save it again"
        )
    return len(sums)


def read(folder: Path) -> dict[str, str]:
    """Return the recorded SHA-256 of the files of a checkpoint, by name.

    Raises:
        CheckpointError: There is no record, or it is malformed.
    """
    path = folder / SUMS
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds no {SUMS}, so nothing can be verified: leave `verify` out, or save "
            f"the policy again"
        )
    sums = {}
    text = documents.read_text(path, CheckpointError, "download it again")
    for line in text.split("\n"):
        match = _LINE.fullmatch(line)
        if match is None and line:
            raise CheckpointError(f"{path} holds the line {line!r:.100}; download it again")
        if match is not None:
            sums[match[2]] = match[1]
    return sums


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); download it again") from error
