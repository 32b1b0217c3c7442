"""Old names of options: the command line accepts them for one version, a stored run does not.

`translate` runs before the options are parsed. Each use of an old name prints a line on stderr that
names the new one.
"""

from __future__ import annotations

import sys

# Old -> new names of the options of `wam train`. A run of an earlier version stores the old ones in
# training/state.json. A dot separates a nested config from its option.
RENAMED_OPTIONS = {
    "every": "window_stride",
    "stride": "frame_stride",
    "threads": "num_threads",
    "out": "output_dir",
    "text": "text_encoder",
    "state_scaling": "state_normalization",
    "action_scaling": "action_normalization",
    "keep_scaling": "keep_normalization",
    "weights": "dataset_weights",
    "sampling_steps": "num_inference_steps",
    "template": "prompt_template",
    "accumulate": "gradient_accumulation_steps",
    "compute": "compute_dtype",
    "checkpointing": "gradient_checkpointing",
    "shard": "fsdp",
    "save_every": "save_steps",
    "keep": "save_total_limit",
    "validation": "validation_fraction",
    "track": "report_to",
    "log_every": "logging_steps",
    "init": "pretrained_path",
    "take": "pretrained_part",
    "train": "trainable",
    "sizes": "model",
    "optimizer.warmup": "optimizer.warmup_steps",
    "optimizer.clip": "optimizer.max_grad_norm",
    "optimizer.ema": "optimizer.ema_decay",
    "optimizer.decay": "optimizer.weight_decay_on",
}

OUTPUT_DIR = {"out": "output-dir"}

EVALUATION = OUTPUT_DIR | {"envs": "num-envs"}

CACHE = {
    "every": "window-stride",
    "init": "pretrained-path",
    "stride": "frame-stride",
    "threads": "num-threads",
}

TRAINING = {
    old.replace("_", "-"): new.replace("_", "-")
    for old, new in RENAMED_OPTIONS.items()
    # `wam train` alone has the first two; the third is a group of options.
    if old not in ("take", "train", "sizes")
}
# A name that ends with a dot stands for a whole group of options.
TRAINING["sizes."] = "model."

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
