"""Resolution of Hub ids and folders to local folders, by huggingface_hub's own download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from wam_policy.errors import CheckpointError
from wam_policy.utils.io import COMMITTED, STAGE

# Files of a checkpoint: neither pickles nor code. A pickle is downloaded only if its file name is
# given.
PATTERNS = ["*.json", "*.safetensors", "*.md", "*.model", "*.txt", "SHA256SUMS"]

# Files of an interrupted save, which only a folder's own writer completes.
IGNORED_PATTERNS = [f"*{STAGE}/*", f"*{COMMITTED}/*"]

# Files of a LeRobot dataset.
DATASET_PATTERNS = ["meta/*", "data/*", "videos/*"]


@dataclass(frozen=True)
class DownloadOptions:
    """Options of a download, with the meaning they have in huggingface_hub."""

    revision: str | None = None
    cache_dir: str | Path | None = None
    force_download: bool = False
    local_files_only: bool = False
    token: str | bool | None = None


def resolve_folder(
    id_or_folder: str | Path,
    download: DownloadOptions,
    patterns: list[str] = PATTERNS,
    kind: Literal["model", "dataset"] = "model",
    *,
    may_be_local: bool = True,
) -> Path:
    """Return the local folder of a checkpoint or dataset, after a download if it is on the Hub.

    Args:
        id_or_folder: Existing folder, or Hub id "organisation/name".
        download: Options of the download.
        patterns: Glob patterns of the files to download.
        kind: Type of the Hub repository.
        may_be_local: Whether the name of a local folder counts.

    Returns:
        Path of the folder.

    Raises:
        CheckpointError: There is no such folder or repository, access is denied, or the network
            is unreachable and the cache is empty.
    """
    name = str(id_or_folder)
    if "\0" in name:
        raise CheckpointError(f"{name!r:.200} is neither a folder nor a Hub id")
    folder = Path(id_or_folder).expanduser()
    if may_be_local and folder.is_dir():
        return folder

    # Report a mistyped path as such, and do not ask the Hub for it.
    is_path = isinstance(id_or_folder, Path) or folder.is_absolute() or name.startswith((".", "~"))
    if is_path or name.count("/") != 1:
        raise CheckpointError(
            f"no folder or file {name!r}; give an existing one, or a Hub id 'organisation/name'"
        )

    offline = constants.HF_HUB_OFFLINE or download.local_files_only
    try:
        snapshot = snapshot_download(
            name,
            repo_type=kind,
            revision=download.revision,
            cache_dir=download.cache_dir,
            force_download=download.force_download,
            local_files_only=offline,
            token=download.token,
            allow_patterns=patterns,
            ignore_patterns=IGNORED_PATTERNS,
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(_explain(error, name, download.revision, offline)) from error
    return Path(snapshot)


def is_hub_snapshot(folder: Path) -> bool:
    """Return whether a folder is a download in the Hub's cache.

    What a checkpoint from the Hub names is on the Hub too, never a local folder.
    """
    snapshots = folder.parent
    return snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--")


def _explain(error: Exception, name: str, revision: str | None, offline: bool) -> str:
    """Return what a failed download means and what to do.

    Args:
        error: Error of huggingface_hub.
        name: Hub id.
        revision: Requested revision.
        offline: Whether the download was restricted to the cache.
    """
    if isinstance(error, HFValidationError):
        return f"{name!r} is neither a folder nor a Hub id: {error}"
    # A gated repository's error is also a missing repository's: its case comes first.
    if isinstance(error, GatedRepoError):
        return f"{name!r} is gated: accept its terms on the Hub and pass `token=…`"
    if isinstance(error, RevisionNotFoundError):
        return f"{name!r} has no revision {revision!r}; check the branch, tag or commit"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"no folder and no Hub repository {name!r}; "
            f"check the spelling, or pass `token=…` if it is private"
        )
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        if offline:
            reason = "offline mode is on"
            remedy = "unset HF_HUB_OFFLINE and `local_files_only` once to download it"
        else:
            reason = "the Hub cannot be reached"
            remedy = "check the network"
        return f"{name!r} is not in the local cache and {reason}; {remedy}"
    return f"cannot download {name!r}: {error}"
