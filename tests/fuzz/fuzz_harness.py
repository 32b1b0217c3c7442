"""Runs cases in forked processes that are stopped when they hang, and counts what came of them."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path

from wam_policy.errors import WAMPolicyError

HANG_SECONDS = 20
MAX_BYTES = 500 * 2**20


class Outcome(IntEnum):
    """What came of a case; the exit code of its process."""

    REFUSED = 0  # an error of this package
    EQUAL = 1  # it acts, or reads, as before the damage
    NOTICED = 2  # it differs, and verification says so
    PLAUSIBLE = 3  # it differs, and nothing could tell: a valid number, or bits without a checksum
    SILENT = 4  # it differs, and nothing says so
    OTHER = 5  # another exception
    HANG = 6
    MEMORY = 7


ALLOWED = {Outcome.REFUSED, Outcome.EQUAL, Outcome.NOTICED, Outcome.PLAUSIBLE}


def _peak() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _run(case: Callable[[], Outcome]) -> Outcome:
    """Run a case in this process."""
    before = _peak()
    try:
        outcome = case()
    except WAMPolicyError:
        outcome = Outcome.REFUSED
    except BaseException:
        traceback.print_exc()
        return Outcome.OTHER
    if _peak() - before > MAX_BYTES:
        return Outcome.MEMORY
    return outcome


def run_case(case: Callable[[], Outcome], log: str) -> Outcome:
    """Run a case in a process of its own.

    Args:
        case: Returns what came of it, or raises.
        log: File that takes what the process prints.
    """
    child = os.fork()
    if child == 0:
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        outcome = Outcome.OTHER
        try:
            outcome = _run(case)
            sys.stderr.flush()
        finally:
            os._exit(outcome)

    deadline = time.monotonic() + HANG_SECONDS
    while time.monotonic() < deadline:
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            # A process that a signal ended crashed, in a library at that.
            return Outcome(os.WEXITSTATUS(status)) if os.WIFEXITED(status) else Outcome.OTHER
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return Outcome.HANG


class Campaign:
    """The cases of one kind: their counts, and those that must not be."""

    def __init__(self, name: str, log: str) -> None:
        self.name = name
        self.log = log
        self.counts: Counter[Outcome] = Counter()
        self.failures: list[str] = []

    def run(self, what: str, case: Callable[[], Outcome]) -> None:
        """Run one case."""
        outcome = run_case(case, self.log)
        self.counts[outcome] += 1
        if outcome not in ALLOWED:
            last = Path(self.log).read_text(encoding="utf-8", errors="replace")[-1500:]
            self.failures.append(f"{outcome.name} {what}\n{last}")

    def report(self) -> None:
        """Print the figures, and fail if a case was not allowed."""
        figures = ", ".join(f"{outcome.name.lower()} {self.counts[outcome]}" for outcome in Outcome)
        print(f"\n{self.name}: {sum(self.counts.values())} cases: {figures}")
        assert not self.failures, "\n\n".join(self.failures[:8])
