"""Crash-safe writing of files and folders, and locks on folders.

A process that is killed at any moment leaves the old files, or a folder that is visibly incomplete.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wam_policy.errors import CheckpointError

STAGE = ".incomplete"


@contextmanager
def replace_files(folder: Path, marker: str, stale: tuple[str, ...] = ()) -> Iterator[Path]:
    """Write files into a staging folder, then move them into `folder`, `marker` last.

    The marker is the file that readers open first. It is absent while files are being moved, so
    that no reader takes a half-replaced folder for a complete one. Other files in `folder` stay.

    Args:
        folder: Destination. It is created if necessary, and removed again if it stays empty.
        marker: Name of the file that marks the folder as complete.
        stale: Glob patterns of files of an earlier version; those that are not replaced are
            deleted.

    Yields:
        The staging folder to write into.
    """
    is_new = not folder.exists()
    stage = folder / STAGE
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    try:
        yield stage
        _publish(stage, folder, marker, stale)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def _publish(stage: Path, folder: Path, marker: str, stale: tuple[str, ...]) -> None:
    """Move all files from the staging folder into `folder`, the marker last."""
    staged = sorted(path.relative_to(stage) for path in stage.rglob("*") if path.is_file())
    for path in staged:
        _sync(stage / path)

    # From here until the last move the folder counts as incomplete.
    (folder / marker).unlink(missing_ok=True)
    for pattern in stale:
        for old in folder.glob(pattern):
            if old.relative_to(folder) not in staged:
                old.unlink()

    # The sort is stable and False comes before True: the marker moves last.
    for path in sorted(staged, key=lambda path: path == Path(marker)):
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        # safetensors creates files that only their owner can read.
        (stage / path).chmod(0o644)
        (stage / path).replace(target)
    _sync(folder)


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically: readers see the old text or the new one."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file atomically: readers see the old bytes or the new ones."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    _sync(temporary)
    temporary.replace(path)


def sync_tree(folder: Path) -> None:
    """Flush every file of a folder to disk."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    """Flush one file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold an exclusive lock on a folder; it ends with this process at the latest.

    Args:
        folder: Folder to lock; it is created if necessary.
        wait: Wait for the process that holds the lock instead of raising an error.

    Raises:
        CheckpointError: Another process holds the lock and `wait` is False.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mode = fcntl.LOCK_EX
    if not wait:
        mode |= fcntl.LOCK_NB
    with (folder / "run.lock").open("w") as file:
        try:
            fcntl.flock(file, mode)
        except BlockingIOError as error:
            raise CheckpointError(
                f"{folder} is in use by a live run; choose another folder or stop that run"
            ) from error
        yield
