"""Checkpoints embedded in the package: small policies trained with this repository's recipes."""

from pathlib import Path

from wam_policy.errors import CheckpointError

EMBEDDED_PREFIX = "embedded:"


def embedded(name: str) -> Path:
    """Return the folder of an embedded checkpoint.

    Raises:
        CheckpointError: There is no embedded checkpoint of that name; the message lists all.
    """
    root = Path(__file__).parent
    names = sorted(path.parent.name for path in root.glob("*/config.json"))
    if name not in names:
        raise CheckpointError(f"no embedded checkpoint {name!r}; choose from {names}")
    return root / name


def resolve_checkpoint(checkpoint: str) -> Path | str:
    """Resolve the `checkpoint` option of a command.

    Args:
        checkpoint: "embedded:<name>", a local path, or a Hub id.

    Returns:
        Path of an embedded or a local checkpoint; any other string unchanged.

    Raises:
        CheckpointError: There is no embedded checkpoint of that name.
    """
    if checkpoint.startswith(EMBEDDED_PREFIX):
        return embedded(checkpoint.removeprefix(EMBEDDED_PREFIX))
    local = Path(checkpoint).expanduser()
    return local if local.exists() else checkpoint
