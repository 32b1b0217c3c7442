"""What is to be loaded, and what the caller says about it that its files do not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wam_policy.errors import CheckpointError, ConfigError
from wam_policy.hub.download import DownloadOptions, resolve_folder
from wam_policy.hub.foreign import light_wam
from wam_policy.presets import ReleaseInfo

STATISTICS = "dataset_stats.json"


@dataclass(frozen=True)
class CheckpointRequest:
    """What is to be read, and what its files don't say."""

    source: str | Path  # folder, file, or Hub id
    filename: str | None = (
        None  # of a file of the reference implementation, in a folder or Hub repository
    )
    release: ReleaseInfo | None = None  # what such a file doesn't say; None: it is a known release
    stats: Path | None = None  # its statistics; None: those beside it

    def locate(self, download: DownloadOptions) -> Path:
        """The local file or folder, downloaded if need be: of a repository of loose files, only what is asked for."""
        path = Path(self.source).expanduser()
        if path.is_file() and self.filename is None:
            return path
        if self.filename is None:
            return resolve_folder(self.source, download)
        found = (
            resolve_folder(
                self.source, download, [self.filename, f"*{STATISTICS}", f"*{light_wam.CONFIG}"]
            )
            / self.filename
        )
        if not found.is_file():
            raise CheckpointError(f"{str(self.source)!r} has no file {self.filename!r}")
        return found


def refuse_release_info(path: Path, wanted: CheckpointRequest) -> None:
    """Refuse what the caller says of a checkpoint that says it itself.

    Raises:
        ConfigError: something was said.
    """
    if wanted.release is not None or wanted.stats is not None:
        raise ConfigError(
            f"{path} says its own contract and statistics: leave out what was said of them"
        )
