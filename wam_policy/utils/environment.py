"""Provenance of a result: package versions, git commit and peak memory."""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def commit() -> str | None:
    """Return the git commit of the checkout this package runs from; None if it is installed."""
    this_file = Path(__file__)
    # An installed package may lie inside another project's checkout: ask whether git tracks it.
    if not _git("ls-files", this_file.name, cwd=this_file.parent):
        return None
    return _git("rev-parse", "HEAD", cwd=this_file.parent) or None


def _git(*arguments: str, cwd: Path) -> str:
    """Return the output of a git command; empty if it fails or git is not installed."""
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=cwd, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return result.stdout.strip()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that affect results."""
    result = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("wam-policy", "torch", "diffusers", "gymnasium", "numpy", "metaworld", "mujoco"):
        with contextlib.suppress(PackageNotFoundError):
            result[name] = version(name)
    return result


def peak_memory(device: torch.device, folder: Path | None = None) -> int | None:
    """Return the peak memory of this process.

    On an accelerator this is the allocated device memory, elsewhere the resident memory of the
    process, memory-mapped files included.

    Args:
        device: Device of the policy.
        folder: Results folder that this process continues; the peak that an earlier run on the
            same device stored there counts too.

    Returns:
        Bytes; None if the system does not report the memory of processes.
    """
    peaks: list[int] = []
    if device.type == "cuda":
        peaks.append(torch.cuda.max_memory_allocated(device))
    else:
        peaks.extend(_peak_resident_memory())

    if folder is not None:
        earlier = _read_summary(folder)
        if earlier.get("device") == str(device) and earlier.get("peak_memory_bytes"):
            peaks.append(earlier["peak_memory_bytes"])
    return max(peaks, default=None)


def _peak_resident_memory() -> list[int]:
    """Return the peak resident memory of this process in bytes; empty if it is not reported."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return []
    lines = status.read_text().splitlines()
    # The kernel reports kibibytes: "VmHWM:     123456 kB".
    return [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]


def _read_summary(folder: Path) -> dict[str, Any]:
    """Return the summary of an earlier run in a results folder; empty if there is none."""
    summary = folder / "summary.json"
    if not summary.is_file():
        return {}
    content: dict[str, Any] = json.loads(summary.read_text())
    return content


def forget_peak_memory(device: torch.device) -> None:
    """Restart the measurement of the peak memory, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # Writing 5 resets VmHWM; see proc(5), "/proc/pid/clear_refs".
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
