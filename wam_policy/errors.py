"""The exceptions of this package: each is a `WAMPolicyError` and also the builtin a caller would expect."""


class WAMPolicyError(Exception):
    """Anything this package refuses, with a message that says what to do."""


class ConfigError(WAMPolicyError, ValueError):
    """A contract (`config.json`) that can't be right."""


class CheckpointError(WAMPolicyError, OSError):
    """A checkpoint that can't be found, read or written."""


class WeightsError(CheckpointError, ValueError):
    """Weights that do not fit the model they are for."""


class ObservationError(WAMPolicyError, ValueError):
    """An observation that isn't what the checkpoint was trained on."""


class ActionError(WAMPolicyError, ValueError):
    """An action, or an action convention, that can't be mapped safely."""


class PromptError(WAMPolicyError, LookupError):
    """An instruction that can't be turned into embeddings here."""


class EnvError(WAMPolicyError, TypeError):
    """An environment that can't be driven as it is."""


class DatasetError(WAMPolicyError, ValueError):
    """A dataset that is broken or is not what the run expects."""


class ResultsError(WAMPolicyError, FileExistsError):
    """A folder that already holds results of something else."""


class MissingExtraError(WAMPolicyError, ImportError):
    """An optional dependency that isn't installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"this needs {package!r}, which isn't installed: pip install 'wam-policy[{extra}]'"
        )


class CompileError(WAMPolicyError, RuntimeError):
    """A policy that can't be compiled here, or no longer is what was compiled."""


class TrainingError(WAMPolicyError, RuntimeError):
    """A training run that can't go on."""
