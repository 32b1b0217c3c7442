"""A run of several processes learns what one learns."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from training_data import make_config, options

from wam_policy import WAMPolicy
from wam_policy.errors import ConfigError
from wam_policy.training.config import OptimizerConfig
from wam_policy.training.loop import train
from wam_policy.training.state import latest


def run(config, processes):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*command, "-m", "wam_policy.cli", "train", *options(config)], capture_output=True, text=True, check=False
    )


def curve(out):
    return [json.loads(row) for row in (out / "curve.jsonl").open()]


@pytest.fixture(scope="module")
def alone(data, codec):
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup=2, ema=0.9)
    config = make_config(data, codec, data.parent / "alone", optimizer=optimizer, log_every=1, save_every=6, validation=0.2)
    train(config)
    return config


def alike(mine, theirs, **tolerance):
    """Whether two curves hold the same numbers."""
    assert [row["step"] for row in mine] == [row["step"] for row in theirs]
    for a, b in zip(mine, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in b.keys() - {"seconds", "samples_per_s", "step"}:
            assert a[name] == pytest.approx(b[name], **tolerance), (a["step"], name)
    return True


@pytest.mark.parametrize("changes", [{}, {"accumulate": 2}], ids=["whole", "in parts"])
def test_two_processes_with_a_copy_each_learn_what_one_learns(alone, tmp_path, changes):
    config = replace(alone, out=tmp_path / "run", **changes)
    done = run(config, 2)
    assert done.returncode == 0, done.stderr[-6000:]
    assert alike(curve(config.out), curve(alone.out), abs=1e-5, rel=1e-5)


def test_two_processes_with_a_shard_each_learn_what_one_learns_and_go_on(alone, tmp_path):
    config = replace(alone, out=tmp_path / "run", shard=True, keep=9)
    done = run(config, 2)
    assert done.returncode == 0, done.stderr[-6000:]
    assert alike(curve(config.out), curve(alone.out), abs=1e-5, rel=1e-5)
    mine, theirs = (WAMPolicy.from_pretrained(latest(one.out)).model.state_dict() for one in (config, alone))
    assert all(torch.allclose(mine[name].float(), x.float(), atol=1e-3) for name, x in theirs.items())
    shards = {path.name for path in (latest(config.out) / "training").iterdir()}
    assert shards == {"state.json", "state_00000.safetensors", "state_00001.safetensors"}

    shutil.rmtree(latest(config.out))
    with pytest.raises(ConfigError, match="processes: was 2, is 1"):
        train(config)
    done = run(config, 2)
    assert done.returncode == 0 and "going on from" in done.stderr, done.stderr[-6000:]
    assert alike(curve(config.out), curve(alone.out), abs=1e-5, rel=1e-5)


def test_shards_compute_in_bfloat16_what_one_process_computes(alone, tmp_path):
    narrow = replace(alone, compute="bfloat16", steps=4, validation=0.0, log_every=4)
    runs = [replace(narrow, out=tmp_path / name, shard=name == "sharded") for name in ("sharded", "alone")]
    done = run(runs[0], 2)
    assert done.returncode == 0, done.stderr[-6000:]
    train(runs[1])
    assert alike(*(curve(config.out) for config in runs), rel=2e-2)


def test_a_batch_that_can_t_be_shared_equally_is_refused(alone, tmp_path):
    done = run(replace(alone, out=tmp_path / "run", batch_size=3), 2)
    assert done.returncode != 0 and "a batch of 3 can't be computed by 2 processes in equal parts" in done.stderr
