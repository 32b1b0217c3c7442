"""A recorded toy dataset, a codec for it, and small runs on them."""

import json
from dataclasses import fields, is_dataclass
from itertools import chain
from pathlib import Path

from tiny import TINY_VAE

from wam_policy.data.record import RecordConfig, record
from wam_policy.training.config import (
    LightSizeConfig,
    LightTrainConfig,
    OptimizerConfig,
    SizeConfig,
    TrainConfig,
)
from wam_policy.training.train_codec import CodecConfig, train_codec

ENV = "tiny:Toy-v0"
RECIPE = OptimizerConfig(learning_rate=1e-3, warmup_steps=2, ema_decay=0.998)
SIZES = SizeConfig(
    video_dim=16,
    video_ffn_dim=16,
    action_expert_dim=16,
    action_expert_ffn_dim=16,
    layers=1,
    heads=1,
    head_dim=12,
    text_dim=16,
    freq_dim=8,
)
LIGHT_SIZES = LightSizeConfig(
    taps=(0,),
    adapter_dim=4,
    lora_rank=2,
    lora_alpha=4.0,
    queries=3,
    pool_heads=2,
    layer_dim=16,
    trunk_dim=16,
    step_dim=8,
)


def make_data(out: Path) -> Path:
    return record(
        RecordConfig(
            output_dir=out,
            env=ENV,
            tasks={"touch": 3, "leave": 2},
            num_workers=1,
            frames_after_success=0,
            seed=0,
        )
    )


def make_codec(data: Path, out: Path) -> Path:
    config = CodecConfig(dataset=data, output_dir=out, steps=3, batch_size=2, num_threads=1)
    return train_codec(config, {k: v for k, v in TINY_VAE.items() if not k.startswith("latents")})


def _run(data, codec, out):
    return {
        "dataset": (str(data),),
        "codec": codec,
        "output_dir": out,
        "frame_stride": 1,
        "window_stride": 1,
        "replan": 2,
        "batch_size": 4,
        "optimizer": RECIPE,
        "compile": False,
        "num_threads": 1,
    }


def make_config(data, codec, out, **changes):
    return TrainConfig(**(_run(data, codec, out) | {"model": SIZES, "steps": 12} | changes))


def make_light(data, codec, init, out, **changes):
    return LightTrainConfig(
        **(
            _run(data, codec, out)
            | {"pretrained_path": init, "model": LIGHT_SIZES, "steps": 6}
            | changes
        )
    )


def options(config, prefix=""):
    """A config as words of the command line."""
    words = []
    for field in fields(config):
        value = getattr(config, field.name)
        word = field.name.replace("_", "-")
        name = prefix + word
        if is_dataclass(value):
            words += options(value, f"{name}.")
        elif isinstance(value, bool):
            words.append(f"--{name}" if value else f"--{prefix}no-{word}")
        elif isinstance(value, tuple | dict):
            parts = chain(*value.items()) if isinstance(value, dict) else value
            if value:
                words += [f"--{name}", *map(str, parts)]
        elif value is not None:
            words.append(f"--{name}={value}")
    return words


def read_curve(run: Path) -> list[dict]:
    """Return the rows of a run's curve."""
    return [json.loads(line) for line in (run / "curve.jsonl").read_text().splitlines()]
