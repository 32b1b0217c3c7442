"""The request to load a checkpoint: where it is, and what its files do not record."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wam_policy.errors import CheckpointError, ConfigError
from wam_policy.hub.download import DownloadOptions, resolve_folder
from wam_policy.hub.foreign import light_wam_config
from wam_policy.presets import ReleaseInfo

STATISTICS = "dataset_stats.json"


@dataclass(frozen=True)
class CheckpointRequest:
    """A checkpoint to read, and the information that its files do not record."""

    # Folder, file or Hub id.
    source: str | Path

    # Name of a reference implementation's file in a folder or Hub repository.
    filename: str | None = None

    # What such a file was trained for; None for a known release.
    release: ReleaseInfo | None = None

    # Dataset statistics of such a file; None for those beside it.
    stats: Path | None = None

    # Whether the source may be a local folder; a checkpoint from the Hub names none.
    may_be_local: bool = True

    def locate(self, download: DownloadOptions) -> Path:
        """Return the local file or folder, after a download if it is on the Hub.

        If a file name is given, only that file, statistics and run configurations are downloaded.

        Args:
            download: Options of the download.

        Returns:
            Path of the file or folder.

        Raises:
            CheckpointError: There is no such file, folder or repository.
        """
        if not self.may_be_local:
            return resolve_folder(self.source, download, may_be_local=False)
        path = Path(self.source).expanduser()
        if path.is_file() and self.filename is None:
            return path
        if self.filename is None:
            return resolve_folder(self.source, download)

        if path.is_file():
            raise CheckpointError(f"{path} is a file: leave out the file name {self.filename!r}")
        patterns = [self.filename, f"*{STATISTICS}", f"*{light_wam_config.CONFIG}"]
        file = resolve_folder(self.source, download, patterns) / self.filename
        if not file.is_file():
            raise CheckpointError(f"{str(self.source)!r} has no file {self.filename!r}")
        return file


def refuse_release_info(path: Path, request: CheckpointRequest) -> None:
    """Check that a request adds nothing to a checkpoint that is fully described by its own files.

    Args:
        path: Folder of the checkpoint.
        request: Request for the checkpoint.

    Raises:
        ConfigError: The request holds release information or statistics.
    """
    if request.release is not None or request.stats is not None:
        raise ConfigError(
            f"{path} holds its own configuration and statistics: "
            f"leave out the release information and `stats`"
        )
