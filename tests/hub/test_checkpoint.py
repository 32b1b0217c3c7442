"""Checkpoint folders are saved and loaded without loss, and damaged ones are refused."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import change_config, make_config, make_observation, make_policy, same

from wam_policy import PolicyConfig, WAMPolicy
from wam_policy.errors import CheckpointError, ConfigError, WAMPolicyError, WeightsError
from wam_policy.hub import weights


@pytest.fixture
def folder(policy, tmp_path):
    return policy.save_pretrained(tmp_path / "checkpoint")


def change_weights(folder, change, name="model.safetensors"):
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)


def test_a_saved_policy_acts_the_same(policy, folder):
    loaded = WAMPolicy.from_pretrained(folder)
    assert loaded.config == policy.config
    assert same(loaded, policy)


def test_the_folder_holds_config_weights_prompts_codec_and_card(folder):
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert names == {
        "config.json",
        "model.safetensors",
        "prompts.safetensors",
        "README.md",
        "SHA256SUMS",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    card = (folder / "README.md").read_text()
    assert (
        "library_name: wam-policy" in card
        and "front, wrist" in card
        and "1 open, -1 closed" in card
    )


def test_prompts_that_share_an_embedding_or_a_batch_of_them_are_saved(tmp_path):
    policy = make_policy()
    known = next(iter(policy.prompts.table))
    policy.add_prompt("the same in other words", policy.prompts.table[known])
    batch = torch.randn(2, 3, policy.prompts.text_dim)
    for i, instruction in enumerate(("lift", "push")):
        policy.add_prompt(instruction, batch[i])
    loaded = WAMPolicy.from_pretrained(policy.save_pretrained(tmp_path / "policy"))
    prompt = policy.config.prompt.prompt
    assert torch.equal(loaded.prompts.table[prompt("push")], batch[1])
    again = loaded.prompts.table[prompt("the same in other words")]
    assert torch.equal(again, policy.prompts.table[known])


def test_files_can_be_read_by_everybody(folder):
    assert all(p.stat().st_mode & 0o044 == 0o044 for p in folder.rglob("*") if p.is_file())


def test_weights_stored_in_bf16_are_computed_in_the_config_s_dtype_or_the_caller_s(
    policy, tmp_path
):
    folder = policy.save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert {x.dtype for x in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert WAMPolicy.from_pretrained(folder).dtype == torch.float32
    loaded = WAMPolicy.from_pretrained(folder, dtype=torch.bfloat16)
    assert (
        loaded.dtype == torch.bfloat16
        and loaded.predict_chunk(make_observation()).dtype == np.float32
    )


def test_shards_and_one_file_hold_the_same(policy, folder, tmp_path):
    one = weights.read_weights(folder)
    (tmp_path / "shards").mkdir()
    weights.write_weights(tmp_path / "shards", one, shard_bytes=20_000)
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    many = weights.read_weights(tmp_path / "shards")
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)
    (folder / "model.safetensors").unlink()
    for shard in (tmp_path / "shards").iterdir():
        shutil.copy(shard, folder)
    assert same(WAMPolicy.from_pretrained(folder), policy)
    next((tmp_path / "shards").glob("model-*.safetensors")).unlink()
    with pytest.raises(WeightsError, match="lacks the shards"):
        weights.read_weights(tmp_path / "shards")


def test_a_folder_without_config_is_refused(folder):
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        WAMPolicy.from_pretrained(folder)


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="the download is incomplete"):
        WAMPolicy.from_pretrained(folder)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "pickle"])
def test_damaged_weights_are_refused(folder, damage):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    if damage == "pickle":
        torch.save({"x": torch.zeros(1)}, path)
    else:
        path.write_bytes(
            {"truncated": whole[:-100], "garbage": b"x" * len(whole), "empty": b""}[damage]
        )
    with pytest.raises(
        WeightsError, match=r"cannot be read as safetensors.*force_download"
    ) as caught:
        WAMPolicy.from_pretrained(folder)
    assert isinstance(caught.value, WAMPolicyError) and isinstance(caught.value, OSError)


def test_missing_extra_and_misshapen_tensors_are_named(folder):
    def change(tensors):
        del tensors["action.head.bias"]
        tensors["action.extra"] = torch.zeros(1)
        tensors["proprio_encoder.bias"] = torch.zeros(3)

    change_weights(folder, change)
    match = (
        r"missing: action\.head\.bias; unexpected: action\.extra; "
        r"misshapen: proprio_encoder\.bias is \[3\], expected \[8\]"
    )
    with pytest.raises(WeightsError, match=match):
        WAMPolicy.from_pretrained(folder)


def test_a_codec_that_does_not_fit_is_refused_when_it_is_needed(folder):
    change_weights(
        folder, lambda tensors: tensors.popitem(), "vae/diffusion_pytorch_model.safetensors"
    )
    with pytest.raises(WeightsError, match="missing"):
        WAMPolicy.from_pretrained(folder).predict_chunk(make_observation())


def test_a_newer_format_is_refused_with_the_cure(folder):
    change_config(folder, lambda data: data.update(format_version=99))
    with pytest.raises(ConfigError, match="pip install -U wam-policy") as caught:
        WAMPolicy.from_pretrained(folder)
    assert isinstance(caught.value, ValueError)


def test_a_foreign_config_is_refused_with_the_cure(folder):
    (folder / "config.json").write_text('{"_class_name": "WanModel"}')
    with pytest.raises(ConfigError, match="another project"):
        WAMPolicy.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: d.pop("vae"), r"missing \['vae'\]"),
        (lambda d: d.update(colour="red"), r"unknown \['colour'\]"),
        (
            lambda d: d["action"].update(horizon="long"),
            r"'action\.horizon': expected int, got 'long'",
        ),
        (lambda d: d["action"].update(horizon=True), r"'action\.horizon': expected int"),
        (lambda d: d["action"].update(replan=9), "between 1 and the horizon 4"),
        (lambda d: d.update(variant="slow"), "variant"),
        (lambda d: d["model"].update(action_dim=7), "action layout has 3 names"),
        (lambda d: d["model"].update(proprio_dim=None), "state has 2 numbers"),
        (lambda d: d["video"].update(frames=9), "span 8 steps"),
        (lambda d: d["prompt"].update(template="do it"), "hold {task} once"),
        (lambda d: d["action"]["layout"]["gripper"].update(closed=1.0), "must differ"),
        (lambda d: d["state"]["normalization"].update(mode="magic"), "magic"),
        (
            lambda d: d["state"]["normalization"]["statistics"].pop("max"),
            r"needs the statistics \['max'\]",
        ),
        (lambda d: d["cameras"].update(names=["front", "front"]), "distinct"),
        (lambda d: d["state"].update(names=["x", "x"]), "distinct"),
        (lambda d: d["vae"].update(subfolder="../elsewhere"), "stay inside"),
        (lambda d: d["vae"].update(subfolder=""), "a `subfolder` of its own"),
        (lambda d: d["video"].update(frames=4), "1 \\+ 4"),
    ],
)
def test_a_config_that_can_t_be_right_is_refused_by_entry(folder, change, match):
    change_config(folder, change)
    with pytest.raises(ConfigError, match=match):
        WAMPolicy.from_pretrained(folder)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused(folder, number):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"action_shift": 5.0', f'"action_shift": {number}'))
    with pytest.raises(ConfigError, match="finite"):
        WAMPolicy.from_pretrained(folder)


def test_a_config_survives_json():
    config = make_config()
    assert PolicyConfig.from_json(config.to_json()) == config


def test_saving_again_leaves_other_files_and_removes_stale_shards(policy, folder):
    (folder / "notes.txt").write_text("mine")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"old")
    policy.save_pretrained(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder / "model-00001-of-00002.safetensors").exists()
    WAMPolicy.from_pretrained(folder)


def test_a_failing_save_leaves_the_old_checkpoint(policy, folder, monkeypatch):
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    monkeypatch.setattr("wam_policy.hub.checkpoint.render_card", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_policy().save_pretrained(folder)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


SAVER = """
import sys; sys.path.insert(0, {tests!r})
from tiny import make_policy
import torch
policy = make_policy()
for parameter in policy.model.parameters():
    torch.nn.init.constant_(parameter, 0.5)
print("ready", flush=True)
while True:
    policy.save_pretrained({folder!r})
"""


@pytest.mark.parametrize(
    "after",
    [
        0.0,
        pytest.param(0.013, marks=pytest.mark.slow),
        0.05,
        pytest.param(0.11, marks=pytest.mark.slow),
    ],
)
def test_a_killed_save_leaves_a_whole_checkpoint_or_none(policy, folder, after):
    """A save killed at any moment leaves the old weights, the new ones, or a refused folder."""
    tests = str(Path(__file__).parent.parent)
    script = SAVER.format(tests=tests, folder=str(folder))
    saver = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert saver.stdout.readline() == b"ready\n"
    time.sleep(after)
    saver.send_signal(signal.SIGKILL)
    saver.wait()
    try:
        loaded = WAMPolicy.from_pretrained(folder)
        found = loaded.model.state_dict()
    except CheckpointError as error:
        assert "no config.json" in str(error)
    else:
        old = policy.model.state_dict()
        assert all(torch.equal(found[n], old[n]) for n in old) or all(
            (x == 0.5).all() for x in found.values()
        )
        assert loaded.prompts.table.keys() == policy.prompts.table.keys() and loaded.vae
    policy.save_pretrained(folder)
    WAMPolicy.from_pretrained(folder)
    assert not (folder / ".incomplete").exists()


def test_weights_of_mixed_dtypes_are_refused_by_name(folder):
    change_weights(
        folder,
        lambda tensors: tensors.update({"action.head.bias": tensors["action.head.bias"].half()}),
    )
    with pytest.raises(
        WeightsError,
        match=r"one dtype of .*, but stores .*float16 \(action\.head\.bias\)",
    ):
        WAMPolicy.from_pretrained(folder)


@pytest.mark.parametrize("piece", [1, 3000, 10**9])
def test_weights_cast_a_piece_at_a_time_are_the_same(policy, folder, monkeypatch, piece):
    monkeypatch.setattr(weights, "CAST_BYTES", piece)
    found = WAMPolicy.from_pretrained(folder, dtype=torch.bfloat16).model.state_dict()
    assert all(
        torch.equal(found[name], x.to(torch.bfloat16))
        for name, x in policy.model.state_dict().items()
    )


def test_weights_that_need_no_cast_stay_mapped_from_their_file(folder):
    policy = WAMPolicy.from_pretrained(folder)
    maps = [
        line.split()
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith("/model.safetensors")
    ]
    spans = [
        tuple(int(end, 16) for end in line[0].split("-"))
        for line in maps
        if str(folder) in line[-1]
    ]
    inside = [
        any(start <= p.data_ptr() < stop for start, stop in spans)
        for p in policy.model.parameters()
    ]
    assert spans and all(inside)


def test_a_folder_of_parts_is_refused_with_what_it_is_for(folder):
    (folder / "base.json").write_text("{}")
    with pytest.raises(CheckpointError, match="wam train --pretrained-path"):
        WAMPolicy.from_pretrained(folder)
