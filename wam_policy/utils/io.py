"""Crash-safe writing of files and folders, and locks on folders.

A folder is replaced like a record of a database: its new files are written beside the old ones, one
rename makes them the valid ones, and then they are moved into place. A process that is killed at
any moment leaves the old folder or the new one; the next reader or writer completes the moves.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from wam_policy.errors import CheckpointError, WAMPolicyError

T = TypeVar("T")

# Folder of files that are being written, and its name once they are valid.
STAGE = ".incomplete"
COMMITTED = ".committed"

# List of the moves, in the folder of committed files.
_MOVES = ".moves.json"

LOCK = "run.lock"

# Times that a reader begins again because another process replaces the folder.
_ATTEMPTS = 3


@contextmanager
def replace_files(folder: Path, marker: str, stale: tuple[str, ...] = ()) -> Iterator[Path]:
    """Write files into a staging folder, then put them all into `folder`, or none.

    Another process that replaces the same folder is waited for.

    Args:
        folder: Destination. It is created if necessary, and removed again if it stays empty.
        marker: Name of the file that marks the folder as complete. Readers open it first.
        stale: Glob patterns of files of an earlier version; those that are not replaced are
            deleted. Other files stay.

    Yields:
        The staging folder to write into.

    Raises:
        CheckpointError: The files cannot be written; what was there before is unchanged.
    """
    stage = folder / STAGE
    with explained_write_errors(folder):
        is_new = not folder.exists()
        try:
            with locked(folder, wait=True):
                try:
                    _complete_moves(folder)
                    shutil.rmtree(stage, ignore_errors=True)
                    stage.mkdir()
                    yield stage
                    _commit(stage, folder, marker, stale)
                    _complete_moves(folder)
                finally:
                    shutil.rmtree(stage, ignore_errors=True)
        finally:
            # It is not empty if it holds the new files, or if another process writes into it.
            if is_new:
                with suppress(OSError):
                    folder.rmdir()


def _commit(stage: Path, folder: Path, marker: str, stale: tuple[str, ...]) -> None:
    """Make the files of the staging folder the valid ones: one rename, after all is on disk."""
    staged = sorted(path.relative_to(stage) for path in stage.rglob("*") if path.is_file())
    replaced = set(staged)
    old = [path.relative_to(folder) for pattern in stale for path in folder.glob(pattern)]
    moves = {
        # The sort is stable and False comes before True: the marker moves last.
        "files": [str(p) for p in sorted(staged, key=lambda path: path == Path(marker))],
        "stale": [str(path) for path in old if path not in replaced],
        "marker": marker,
    }
    (stage / _MOVES).write_text(json.dumps(moves), encoding="utf-8")
    sync_tree(stage)
    stage.rename(folder / COMMITTED)
    _sync(folder)


def _complete_moves(folder: Path) -> None:
    """Move the committed files of a locked folder into place, if there are any."""
    committed = folder / COMMITTED
    if not committed.is_dir():
        return
    moves = json.loads((committed / _MOVES).read_text(encoding="utf-8"))

    # From here until the last move the folder counts as incomplete.
    if (committed / moves["marker"]).exists():
        _inside(folder, moves["marker"]).unlink(missing_ok=True)
    for name in moves["stale"]:
        _inside(folder, name).unlink(missing_ok=True)
    for name in moves["files"]:
        # A process that was killed has moved some of them.
        if (committed / name).exists():
            target = _inside(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            # safetensors creates files that only their owner can read.
            (committed / name).chmod(0o644)
            (committed / name).replace(target)
    _sync(folder)

    # A rename ends the replacement: a process that is killed while it removes the rest leaves
    # nothing that looks committed.
    shutil.rmtree(folder / STAGE, ignore_errors=True)
    committed.rename(folder / STAGE)
    shutil.rmtree(folder / STAGE, ignore_errors=True)


def _inside(folder: Path, name: str) -> Path:
    """Return the path of a file in a folder, after a check that it leads nowhere else.

    The list of moves may come with a folder that someone else made.
    """
    path = folder / name
    if not path.parent.resolve().is_relative_to(folder.resolve()) or path.name in ("", ".."):
        raise ValueError(f"{name!r} is no file of the folder")
    return path


def read_consistently(folder: Path, marker: str, read: Callable[[], T]) -> T:
    """Read a folder that another process may replace meanwhile: all is of one version.

    Args:
        folder: Folder that is written by `replace_files`.
        marker: Name of the file that marks it as complete.
        read: Reads the folder.

    Returns:
        The result of `read`.

    Raises:
        CheckpointError: An interrupted replacement cannot be completed.
        WAMPolicyError: As `read` raises it.
    """
    for _ in range(_ATTEMPTS):
        recover(folder)
        before = version(folder, marker)
        try:
            result = read()
        except WAMPolicyError:
            if version(folder, marker) == before and not (folder / COMMITTED).exists():
                raise
        else:
            # Without a marker the folder is not written by `replace_files`.
            if version(folder, marker) == before:
                return result

    # It is replaced faster than it can be read: let the writers wait.
    with locked(folder, wait=True):
        _complete_moves(folder)
        return read()


def recover(folder: Path) -> None:
    """Complete the replacement of a folder whose process was killed, or wait for a live one.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    if not (folder / COMMITTED).is_dir():
        return
    try:
        with locked(folder, wait=True):
            _complete_moves(folder)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"{folder} holds an interrupted save ({COMMITTED}/), which cannot be completed here "
            f"({error}); load it once with permission to write"
        ) from error


def version(folder: Path, marker: str) -> tuple[int, ...] | None:
    """Return what changes whenever a folder is replaced; None if it has no marker."""
    try:
        status = (folder / marker).stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically: readers see the old text or the new one.

    Raises:
        CheckpointError: See `write_bytes`.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file atomically: readers see the old bytes or the new ones.

    Several processes may write the same file; the last one's bytes stay.

    Raises:
        CheckpointError: The file cannot be written; the old one is unchanged.
    """
    with explained_write_errors(path):
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            # `mkstemp` creates files that only their owner can read.
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def explained_write_errors(
    path: Path, error: type[WAMPolicyError] = CheckpointError
) -> Iterator[None]:
    """Report a full disk, a missing permission and the like as errors of this package.

    Args:
        path: File or folder that is written.
        error: Class of the error to raise.

    Raises:
        WAMPolicyError: As `error`: it cannot be written.
    """
    # Imported here: not everything that writes files needs it.
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as problem:
        # Errors of this package explain themselves.
        if isinstance(problem, WAMPolicyError):
            raise
        raise error(
            f"cannot write {path} ({problem}); what was there before is unchanged: free some "
            f"space, or choose a folder that you may write"
        ) from problem


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
        CheckpointError: Another process holds the lock and `wait` is False, or the folder cannot be
            written.
    """
    with explained_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(folder, wait)
    try:
        yield
    finally:
        # Removed while the lock is held: `_acquire` notices.
        (folder / LOCK).unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(folder: Path, wait: bool) -> int:
    """Return the open descriptor of a folder's lock file, which is locked."""
    mode = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, mode)
            # The process before may have removed the file that this one waited for.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise CheckpointError(
                f"{folder} is in use by a live run; choose another folder or stop that run"
            ) from error
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
