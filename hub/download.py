"""From an id or a folder to a local folder, by huggingface_hub's own download."""

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

PATTERNS = ["*.json", "*.safetensors", "*.md", "*.model", "*.txt"]  # never pickles, never code
DATASET_PATTERNS = ["meta/*", "data/*", "videos/*"]  # of a LeRobot dataset


@dataclass(frozen=True, kw_only=True)
class DownloadOptions:
    """How files are fetched; the meaning of each field is huggingface_hub's."""

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
) -> Path:
    """Return the local folder of a checkpoint or a dataset, downloading it if it isn't a folder.

    Raises:
        CheckpointError: no such folder or repo, no access, no network and nothing in the cache.
    """
    folder = Path(id_or_folder).expanduser()
    if folder.is_dir():
        return folder
    name = str(id_or_folder)
    if (
        folder.is_absolute()
        or name.startswith((".", "~"))
        or name.count("/") != 1
        or isinstance(id_or_folder, Path)
    ):
        raise CheckpointError(
            f"no folder or file {name!r}; give an existing one, or a Hub id 'organisation/name'"
        )
    offline = constants.HF_HUB_OFFLINE or download.local_files_only
    try:
        return Path(
            snapshot_download(
                name,
                repo_type=kind,
                revision=download.revision,
                cache_dir=download.cache_dir,
                force_download=download.force_download,
                local_files_only=offline,
                token=download.token,
                allow_patterns=patterns,
            )
        )
    except HFValidationError as error:
        raise CheckpointError(f"{name!r} is neither a folder nor a Hub id: {error}") from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name!r} is gated: accept its terms on the Hub and pass `token=…`"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{name!r} has no revision {download.revision!r}") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"no folder and no Hub repository {name!r}; check the spelling, or pass `token=…` if it is private"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        why = "offline mode is on" if offline else "the Hub can't be reached"
        cure = (
            "unset HF_HUB_OFFLINE and `local_files_only` once to download it"
            if offline
            else "check the network"
        )
        raise CheckpointError(f"{name!r} isn't in the local cache and {why}; {cure}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"can't download {name!r}: {error}") from error
