"""What is held out is never trained on, and what is measured on it is what the policy does."""

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from training_data import make_config, read_curve

from wam_policy import WAMPolicy
from wam_policy.errors import MissingExtraError
from wam_policy.models.fast_wam.loss import LossConfig
from wam_policy.training import report, trainer
from wam_policy.training.config import OptimizerConfig
from wam_policy.training.trainer import train
from wam_policy.training.validation import held_out


@given(st.integers(2, 500), st.floats(0, 0.999))
def test_some_episodes_are_held_out_and_never_all(episodes, part):
    mask = held_out(episodes, part)
    assert mask.sum() == min(episodes - 1, max(1, round(episodes * part))) * (part > 0)
    assert np.array_equal(mask, held_out(episodes, part))


def test_held_out_windows_are_not_trained_on_and_their_error_is_the_policy_s(
    data, codec, tmp_path, monkeypatch
):
    seen = []
    advance = trainer.train_step
    validate = trainer.validate

    def watching(config, state, examples, order):
        seen.append(set(examples.names))
        return advance(config, state, examples, order)

    def checking(config, policy, examples):
        seen.append(set(examples.names))
        return validate(config, policy, examples)

    monkeypatch.setattr(trainer, "train_step", watching)
    monkeypatch.setattr(trainer, "validate", checking)
    config = make_config(
        data,
        codec,
        tmp_path / "run",
        steps=4,
        save_steps=2,
        validation_fraction=0.3,
        validation_windows=5,
    )
    folder = train(config)
    trained, held = seen[0], seen[2]
    assert trained and held and not trained & held
    assert {name.split(" from")[0] for name in trained}.isdisjoint(
        name.split(" from")[0] for name in held
    )
    rows = read_curve(config.output_dir)
    found = [row for row in rows if "val_error" in row]
    assert [row["step"] for row in found] == [2, 4] and all(
        np.isfinite(list(row.values())).all() for row in found
    )
    assert 0 < found[-1]["val_error"] < 2 and WAMPolicy.from_pretrained(folder)
    assert 0 < found[-1]["val_psnr"] < 60


def test_what_a_stop_left_unmeasured_is_measured_when_the_run_goes_on(data, codec, tmp_path):
    config = make_config(
        data,
        codec,
        tmp_path / "run",
        steps=4,
        save_steps=2,
        save_total_limit=9,
        validation_fraction=0.3,
        validation_windows=5,
    )
    train(config)
    rows = (config.output_dir / "curve.jsonl").read_text()
    stopped = [
        row
        for row in rows.splitlines(keepends=True)
        if json.loads(row)["step"] == 2 and "val_error" not in row
    ]
    (config.output_dir / "curve.jsonl").write_text("".join(stopped))
    shutil.rmtree(config.output_dir / "checkpoints/step_00000004")
    train(config)
    mine, theirs = (
        [row for row in map(json.loads, one.splitlines()) if "val_error" in row]
        for one in ((config.output_dir / "curve.jsonl").read_text(), rows)
    )
    assert mine == theirs and [row["step"] for row in mine] == [2, 4]


def test_a_finished_run_shows_its_curves_its_futures_and_says_in_its_card_what_it_was(
    data, codec, tmp_path
):
    config = make_config(
        data,
        codec,
        tmp_path / "run",
        steps=4,
        logging_steps=2,
        save_steps=2,
        validation_fraction=0.3,
    )
    folder = train(config)
    with (
        Image.open(config.output_dir / "curves.png") as curves,
        Image.open(config.output_dir / "futures.png") as futures,
    ):
        assert curves.width > curves.height > 100
        # Recorded and imagined clips of four windows; five frames of two cameras.
        height, width = (n * 16 for n in (2 * 4, 5 * 2))
        assert futures.width / futures.height == width / height
    card = (folder / "README.md").read_text()
    for words in (
        "| Updates | 4 of 4 windows, AdamW at 0.001",
        "30% of the episodes held out",
        "PSNR",
        "averaged with 0.998",
    ):
        assert words in card, words
    silent = replace(
        config,
        output_dir=tmp_path / "silent",
        loss=LossConfig(lambda_video=0.0),
        validation_fraction=0.0,
    )
    train(silent)
    assert (
        not (silent.output_dir / "futures.png").exists()
        and (silent.output_dir / "curves.png").exists()
    )


def test_psnr_is_of_the_frames_that_were_imagined_and_rows_are_real_over_imagined(tmp_path):
    real = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 6, 3), np.uint8)
    imagined = real.copy()
    imagined[:, 0] = 0  # the observed frame isn't imagined
    assert report.video_psnr(real, imagined) == 100
    report.contact_sheet(real, imagined, tmp_path / "sheet.png", min_height=4)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert np.array_equal(np.asarray(sheet)[4:8, 6:12], real[0, 1]) and sheet.size == (
            3 * 6,
            4 * 4,
        )


def test_checkpoints_are_played_in_an_env_while_a_run_trains(data, codec, tmp_path):
    playing = {"eval_env": "tiny:Toy-v0", "eval_tasks": ("touch",), "eval_episodes": 2}
    config = make_config(data, codec, tmp_path / "run", steps=4, save_steps=2, **playing)
    train(config)
    rows = read_curve(config.output_dir)
    assert [(row["step"], row["success_touch"]) for row in rows if "success_touch" in row] == [
        (2, 1.0),
        (4, 1.0),
    ]
    assert (config.output_dir / "eval/step_00000004/summary.json").is_file()


def test_a_compiled_run_is_validated_in_shapes_of_its_own(data, codec, tmp_path):
    """Shapes that only a validation uses trigger no recompilation, and so reach no limit of it."""
    optimizer = OptimizerConfig(learning_rate=1e-3)  # nothing is averaged
    changes = {
        "compile": True,
        "steps": 2,
        "save_steps": 1,
        "validation_fraction": 0.3,
        "optimizer": optimizer,
        "batch_size": 3,
    }
    config = make_config(data, codec, tmp_path / "run", validation_windows=7, **changes)
    with torch._dynamo.config.patch(recompile_limit=3):
        train(config)
    rows = read_curve(config.output_dir)
    assert [row["step"] for row in rows if "val_error" in row] == [1, 2]


def test_rows_go_to_the_trackers_too(data, codec, tmp_path, monkeypatch):
    class Fake:
        rows = []

        @staticmethod
        def init(**options):
            Fake.options = options

        @staticmethod
        def log(row, step):
            Fake.rows.append((step, row))

    monkeypatch.setitem(sys.modules, "trackio", Fake)
    train(
        make_config(data, codec, tmp_path / "run", steps=4, logging_steps=2, report_to=("trackio",))
    )
    assert Fake.options == {"project": "wam-policy", "name": "run"}
    assert [step for step, _ in Fake.rows] == [2, 4] and {"video", "action", "norm"} <= Fake.rows[
        0
    ][1].keys()


def test_a_tracker_that_isn_t_installed_is_named(data, codec, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match="wandb"):
        train(make_config(data, codec, tmp_path / "run", report_to=("wandb",)))


def test_two_trainings_of_one_seed_are_one(data, codec, tmp_path):
    folders = [train(make_config(data, codec, tmp_path / name, steps=3)) for name in ("a", "b")]
    a, b = (WAMPolicy.from_pretrained(folder).model.state_dict() for folder in folders)
    assert all(torch.equal(x, b[name]) for name, x in a.items())
