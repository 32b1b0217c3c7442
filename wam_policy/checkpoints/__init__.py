"""The checkpoints that come with the package: small policies trained by this repository's own recipes."""

from pathlib import Path

from wam_policy.errors import CheckpointError


def embedded(name: str) -> Path:
    """The folder of a checkpoint that comes with the package.

    Raises:
        CheckpointError: there is none of that name; the message lists those there are.
    """
    root = Path(__file__).parent
    names = sorted(path.parent.name for path in root.glob("*/config.json"))
    if name not in names:
        raise CheckpointError(f"no embedded checkpoint {name!r}; there are {names}")
    return root / name


def resolve_checkpoint(checkpoint: str) -> Path | str:
    """What a command's `checkpoint` names: "embedded:<name>" the folder of that one, else what `from_pretrained` takes."""
    name = checkpoint.removeprefix("embedded:")
    local = embedded(name) if name != checkpoint else Path(checkpoint).expanduser()
    return local if local.exists() else checkpoint
