"""Puts files into a folder so that a kill at any moment leaves the old ones, or a folder that is plainly incomplete."""

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
    """Stage files, then move them into `folder`, `marker` last.

    While files are being moved `marker` (the file readers look for first) is absent, so a half-replaced folder is never
    taken for a whole one. Other files in the folder stay.

    Args:
        folder: where the files will be; made if it doesn't exist, and gone again if nothing comes of it.
        marker: name of the file without which the folder is nothing.
        stale: glob patterns of files of an older version that go, if they aren't replaced.

    Yields:
        The staging folder to write into.
    """
    stage, fresh = folder / STAGE, not folder.exists()
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    try:
        yield stage
        staged = sorted(path.relative_to(stage) for path in stage.rglob("*") if path.is_file())
        for path in staged:
            _sync(stage / path)
        (folder / marker).unlink(missing_ok=True)
        for pattern in stale:
            for old in folder.glob(pattern):
                if old.relative_to(folder) not in staged:
                    old.unlink()
        for path in sorted(staged, key=lambda path: path == Path(marker)):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (stage / path).chmod(0o644)  # safetensors makes files that only their owner can read
            (stage / path).replace(folder / path)
        _sync(folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if fresh and not any(folder.iterdir()):
            folder.rmdir()


def write_text(path: Path, text: str) -> None:
    """Write a small file so that readers see the old text or the new one."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file so that readers see the old bytes or the new ones."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    _sync(temporary)
    temporary.replace(path)


def sync_tree(folder: Path) -> None:
    """Have every file of a folder on disk when this returns."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep other runs out of a folder, for as long as this process lives.

    Raises:
        CheckpointError: a live run has it, which isn't to be waited for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "run.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise CheckpointError(
                f"{folder} is in use by a live run; choose another folder or stop that run"
            ) from error
        yield
