"""`wam`: a table of subcommands, each a dataclass of options and the function that takes it."""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from typing import Any

from wam_policy.errors import WAMPolicyError

COMMANDS = {  # name -> (options, function, what it does)
    "demo": (
        "wam_policy.evaluation.demo:DemoConfig",
        "wam_policy.evaluation.demo:demo",
        "watch the embedded policy solve its tasks",
    ),
    "eval": (
        "wam_policy.evaluation.evaluate:EvalConfig",
        "wam_policy.evaluation.evaluate:evaluate",
        "measure a checkpoint in a simulator",
    ),
    "compare": (
        "wam_policy.evaluation.compare:CompareConfig",
        "wam_policy.evaluation.compare:compare",
        "measure several checkpoints beside each other",
    ),
    "infer": ("wam_policy.infer:InferConfig", "wam_policy.infer:infer", "ask a checkpoint once"),
    "bench": (
        "wam_policy.profiling.benchmark:BenchConfig",
        "wam_policy.profiling.benchmark:bench",
        "measure a control step",
    ),
    "convert": (
        "wam_policy.hub.convert:ConvertConfig",
        "wam_policy.hub.convert:convert",
        "convert a foreign checkpoint",
    ),
    "info": (
        "wam_policy.hub.info:InfoConfig",
        "wam_policy.hub.info:info",
        "tell what a checkpoint is and needs",
    ),
    "record": (
        "wam_policy.data.record:RecordConfig",
        "wam_policy.data.record:record",
        "record demonstrations",
    ),
    "import-minari": (
        "wam_policy.data.minari:MinariConfig",
        "wam_policy.data.minari:import_minari",
        "make a LeRobot dataset of a Minari one",
    ),
    "train-codec": (
        "wam_policy.training.train_codec:CodecConfig",
        "wam_policy.training.train_codec:train_codec",
        "train a video codec",
    ),
    "cache": (
        "wam_policy.data.config:CacheConfig",
        "wam_policy.training.cache:cache",
        "encode a dataset before a training",
    ),
    "train": (
        "wam_policy.training.config:TrainConfig",
        "wam_policy.training.trainer:train",
        "train a Fast-WAM",
    ),
    "train-light": (
        "wam_policy.training.config:LightTrainConfig",
        "wam_policy.training.trainer:train",
        "train a Light-WAM",
    ),
}


def _load(place: str) -> Any:
    module, name = place.split(":")
    return getattr(import_module(module), name)


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand; errors of this package are printed without a traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] not in COMMANDS:
        wanted_help = not arguments or arguments[0] in ("-h", "--help")
        if not wanted_help:
            print(f"wam: no command {arguments[0]!r}", file=sys.stderr)
        lines = [f"  {name:14} {text}" for name, (_, _, text) in COMMANDS.items()]
        print(
            "usage: wam COMMAND [OPTIONS]   (wam COMMAND --help lists the options)\n",
            *lines,
            sep="\n",
        )
        return 0 if wanted_help else 2
    import tyro

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options, function, text = COMMANDS[arguments[0]]
    try:
        config = tyro.cli(
            _load(options), args=arguments[1:], prog=f"wam {arguments[0]}", description=text
        )
        _load(function)(config)
    except WAMPolicyError as error:
        print(f"wam: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
