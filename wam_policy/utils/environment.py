"""What a result was made with: versions, commit, memory."""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def commit() -> str | None:
    """The commit of the checkout this package runs from; None where it is installed."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        try:
            result = subprocess.run(
                ["git", *arguments], cwd=here.parent, capture_output=True, text=True, check=False
            )
        except OSError:  # no git on this machine
            return ""
        return result.stdout.strip()

    return git("rev-parse", "HEAD") or None if git("ls-files", here.name) else None


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("wam-policy", "torch", "diffusers", "gymnasium", "numpy", "metaworld", "mujoco"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def peak_memory(device: torch.device, folder: Path | None = None) -> int | None:
    """Largest memory of this process, in bytes: the device's on an accelerator, else resident, mapped files included.

    Args:
        device: where the policy runs.
        folder: of results that this process takes up: what a finished earlier one on the same device needed counts too.

    Returns:
        None where the system doesn't tell.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    peaks = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
    if device.type == "cuda":
        peaks = [torch.cuda.max_memory_allocated(device)]
    summary = None if folder is None else folder / "summary.json"
    earlier = json.loads(summary.read_text()) if summary is not None and summary.is_file() else {}
    if earlier.get("device") == str(device) and earlier.get("peak_memory_bytes"):
        peaks.append(earlier["peak_memory_bytes"])
    return max(peaks, default=None)


def forget_peak_memory(device: torch.device) -> None:
    """Let this process's peak memory begin anew; without effect where the system doesn't let it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
