"""Old names of command-line options, which keep working for one version.

`translate` runs before the options are parsed. Each use of an old name prints a line on stderr that
names the new one.
"""

from __future__ import annotations

import sys

OUTPUT_DIR = {"out": "output-dir"}

EVALUATION = OUTPUT_DIR | {"envs": "num-envs"}

CACHE = {
    "every": "window-stride",
    "init": "pretrained-path",
    "stride": "frame-stride",
    "threads": "num-threads",
}

TRAINING = {
    **OUTPUT_DIR,
    **CACHE,
    "accumulate": "gradient-accumulation-steps",
    "action-scaling": "action-normalization",
    "checkpointing": "gradient-checkpointing",
    "compute": "compute-dtype",
    "keep": "save-total-limit",
    "keep-scaling": "keep-normalization",
    "log-every": "logging-steps",
    "optimizer.clip": "optimizer.max-grad-norm",
    "optimizer.decay": "optimizer.weight-decay-on",
    "optimizer.ema": "optimizer.ema-decay",
    "optimizer.warmup": "optimizer.warmup-steps",
    "sampling-steps": "num-inference-steps",
    "save-every": "save-steps",
    "shard": "fsdp",
    "state-scaling": "state-normalization",
    "template": "prompt-template",
    "text": "text-encoder",
    "track": "report-to",
    "validation": "validation-fraction",
    "weights": "dataset-weights",
    # A name that ends with a dot stands for a whole group of options.
    "sizes.": "model.",
}

# Old -> new name of the options of each command.
OLD_OPTIONS: dict[str, dict[str, str]] = {
    "bench": OUTPUT_DIR,
    "cache": CACHE,
    "compare": EVALUATION,
    "convert": {"text": "text-encoder"},
    "demo": OUTPUT_DIR,
    "eval": EVALUATION,
    "import-minari": OUTPUT_DIR,
    "record": {
        **OUTPUT_DIR,
        "hold": "frames-after-success",
        "noise": "action-noise",
        "shoves": "perturbation-rate",
        "workers": "num-workers",
    },
    "train": TRAINING | {"take": "pretrained-part", "train": "trainable"},
    "train-codec": {
        **OUTPUT_DIR,
        "detail": "foreground-weight",
        "init": "pretrained-path",
        "stride": "frame-stride",
        "threads": "num-threads",
    },
    "train-light": TRAINING,
}


def translate(command: str, arguments: list[str]) -> list[str]:
    """Return the arguments of a command with the new names of its options.

    Args:
        command: Name of the subcommand.
        arguments: Arguments after the subcommand, as `--option value` or `--option=value`.
    """
    renames = OLD_OPTIONS.get(command, {})
    translated = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        new_option = _new_option(option, renames)
        if new_option is None:
            translated.append(argument)
            continue
        print(
            f"wam: `{option}` is now called `{new_option}`; "
            f"the old name will be removed in the next version",
            file=sys.stderr,
        )
        translated.append(new_option + equals + value)
    return translated


def _new_option(option: str, renames: dict[str, str]) -> str | None:
    """Return the new name of an option with its dashes; None if it was not renamed."""
    if not option.startswith("--"):
        return None
    # The command line accepts underscores in the place of dashes.
    name = option.removeprefix("--").replace("_", "-")

    # `--no-…` switches a boolean off.
    for prefix in ("", "no-"):
        if not name.startswith(prefix):
            continue
        new_name = renames.get(name.removeprefix(prefix))
        if new_name is not None:
            return f"--{prefix}{new_name}"

    group, dot, field = name.partition(".")
    new_group = renames.get(group + dot)
    if dot and new_group is not None:
        return f"--{new_group}{field}"
    return None
