"""A run is killed, goes on, and what it made is loaded and played: by commands alone."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import tiny
import torch
from safetensors.torch import load_file
from training_data import ENV, make_config, options

from wam_policy import WAMPolicy
from wam_policy.training.checkpoint import latest_checkpoint
from wam_policy.training.trainer import train

WAM = (sys.executable, "-m", "wam_policy.cli")


def test_train_kill_resume_export_load_evaluate(data, codec, tmp_path, monkeypatch):
    config = make_config(data, codec, tmp_path / "run", steps=2, save_steps=1, save_total_limit=5)
    running = subprocess.Popen([*WAM, "train", *options(config)], stderr=subprocess.DEVNULL)
    while latest_checkpoint(config.output_dir) is None:
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    subprocess.run([*WAM, "train", *options(config)], check=True)
    whole = replace(config, output_dir=tmp_path / "whole")
    train(whole)
    mine, theirs = (
        load_file(latest_checkpoint(run.output_dir) / "training/state.safetensors")
        for run in (config, whole)
    )
    assert mine.keys() == theirs.keys() and all(
        torch.equal(x, theirs[name]) for name, x in mine.items()
    )

    exported = config.output_dir / "checkpoint"
    assert len(WAMPolicy.from_pretrained(exported).prompts.table) == 2
    monkeypatch.setenv("PYTHONPATH", str(Path(tiny.__file__).parent))
    played = (
        f"--checkpoint={exported}",
        f"--env={ENV}",
        "--episodes=2",
        "--no-video",
        f"--output-dir={tmp_path / 'eval'}",
    )
    subprocess.run([*WAM, "eval", *played, "--tasks", "touch"], check=True)
    summary = json.loads((tmp_path / "eval/summary.json").read_text())
    assert summary["tasks"]["touch"]["episodes"] == 2
