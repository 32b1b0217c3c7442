"""Numbers are judged before they are used: weights, sizes, statistics, prompts."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from foreign_files import RELEASE, SIZES, lerobot, statistics, tensors, upstream
from safetensors.torch import load_file, save_file
from tiny import change_config, make_observation, make_policy, same

from wam_policy import WAMPolicy, presets
from wam_policy.errors import CheckpointError, ConfigError, PromptError, WeightsError
from wam_policy.hub import weights
from wam_policy.models.encoders.text import clean_prompt
from wam_policy.normalize import Normalization


@pytest.fixture
def folder(tmp_path):
    return make_policy().save_pretrained(tmp_path / "policy")


# -- shards, dtypes and numbers --------------------------------------------------------------------


def test_float8_is_refused_in_every_layout(tmp_path):
    folder = lerobot(tmp_path / "lerobot", tensors())
    path = folder / "model.safetensors"
    short = {name: x.to(torch.float8_e4m3fn) for name, x in load_file(path).items()}
    save_file(short, path)
    native = make_policy().save_pretrained(tmp_path / "native")
    file = native / "model.safetensors"
    save_file({name: x.to(torch.float8_e4m3fn) for name, x in load_file(file).items()}, file)
    for place in (folder, native):
        with pytest.raises(WeightsError, match="one dtype of float32, bfloat16, float16"):
            WAMPolicy.from_pretrained(place)


def shard(folder):
    state = WAMPolicy.from_pretrained(folder, mmap=False).model.state_dict()
    (folder / "model.safetensors").unlink()
    weights.write_weights(folder, state, shard_bytes=4000)
    return folder / "model.safetensors.index.json"


def test_a_single_file_beside_shards_is_refused(folder):
    whole = (folder / "model.safetensors").read_bytes()
    shard(folder)
    assert same(WAMPolicy.from_pretrained(folder), make_policy())
    (folder / "model.safetensors").write_bytes(whole)
    with pytest.raises(WeightsError, match=r"holds model\.safetensors and also model-00001"):
        WAMPolicy.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.update(unknown="model-00001-of-00009.safetensors"), "lacks the shards"),
        (
            lambda m: m.update(unknown=sorted(m.values())[0]),
            "index beside it differ in unknown",
        ),
        (lambda m: m.update(dict.fromkeys(m, "../model.safetensors")), "lacks the shards"),
        (lambda m: m.update({"a": "9" * 5000}), "lacks the shards"),
        (lambda m: m.update(a=3), "must name the file of each tensor"),
        (lambda m: m.clear(), "must name the file of each tensor"),
    ],
)
def test_an_index_that_is_not_of_its_shards_is_refused(folder, change, match):
    index = shard(folder)
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=match):
        WAMPolicy.from_pretrained(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("what", ["weight", "codec", "decoder", "prompt"])
def test_numbers_that_are_not_finite_are_refused_when_they_are_used(folder, what, value):
    stem = {"weight": "model", "prompt": "prompts"}.get(what, "vae/diffusion_pytorch_model")
    path = folder / f"{stem}.safetensors"
    state = load_file(path)
    name = {"codec": "encoder.conv_out.weight", "decoder": "decoder.conv_out.weight"}.get(what)
    name = name or next(iter(state))
    state[name].view(-1)[0] = value
    save_file(state, path)
    with pytest.raises((WeightsError, PromptError), match="not finite"):
        WAMPolicy.from_pretrained(folder).imagine(make_observation())


def test_actions_that_are_not_finite_never_leave_the_policy():
    policy = make_policy()
    policy.check_weights()
    with torch.no_grad():
        next(policy.model.parameters()).fill_(float("nan"))
    with pytest.raises(WeightsError, match="actions are not finite"):
        policy.predict_chunk(make_observation())


def test_a_dtype_that_cannot_hold_the_weights_is_refused_before_anything_is_written(folder):
    policy = make_policy()
    with torch.no_grad():
        next(policy.model.parameters()).view(-1)[0] = 1e6
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(WeightsError, match="its dtype cannot hold the numbers"):
        policy.save_pretrained(folder, dtype="float16")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("dtype", ["float64", "int8", "floaty", torch.int64])
def test_a_dtype_that_nothing_computes_in_is_refused(folder, dtype):
    with pytest.raises(ConfigError, match="models compute in float32, bfloat16, float16"):
        WAMPolicy.from_pretrained(folder, dtype=dtype)
    assert WAMPolicy.from_pretrained(folder, dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("part", "entries"),
    [
        ("model", {"layers": 10**9}),
        ("model", {"head_dim": 2**63}),
        ("model", {"video_dim": 10**9}),
        ("model", {"latent_channels": 10**30}),
        ("model", {"layers": 500}),
        ("sampling", {"seed": 2**64}),
        ("sampling", {"steps": 2**32}),
        ("prompt", {"token_length": 10**9}),
        ("cameras", {"height": 10**6}),
        ("cameras", {"names": [f"camera {i}" for i in range(40)]}),
        ("vae", {"subfolder": "x" * 5000}),
        (None, {"format_version": 0}),
        (None, {"format_version": True}),
    ],
)
def test_numbers_that_no_weights_stand_behind_are_refused(folder, part, entries):
    def change(config):
        place = config if part is None else config[part]
        place.update(entries)

    change_config(folder, change)
    with pytest.raises((ConfigError, CheckpointError)):
        WAMPolicy.from_pretrained(folder)


@pytest.mark.parametrize(
    ("mode", "given"),
    [
        ("min_max", {"min": (1.0,), "max": (0.0,)}),
        ("quantile", {"q01": (1.0,), "q99": (0.0,)}),
        ("z_score", {"mean": (0.0,), "std": (-1.0,)}),
        ("z_score", {"mean": (0.0,), "std": (0.0,)}),
        ("min_max", {"min": (0.0,), "max": (1e300,)}),
    ],
)
def test_statistics_that_cannot_be_are_refused(mode, given):
    with pytest.raises(ConfigError):
        Normalization(mode=mode, statistics=given)


@pytest.mark.parametrize("value", [True, "1", None, [1.0], 10**400, float("nan")])
def test_statistics_in_a_file_are_numbers(tmp_path, value):
    stats = statistics()
    stats["action"]["default"]["global_max"][2] = value
    path = upstream(tmp_path, tensors(), stats=stats)
    with pytest.raises(CheckpointError, match=r"global_max|not finite"):
        WAMPolicy.from_pretrained(path, release=RELEASE)


@pytest.mark.parametrize("change", ["int64", "bool", "missing", "broken link"])
def test_a_table_of_prompts_that_is_none_is_refused(folder, change):
    path = folder / "prompts.safetensors"
    if change == "int64":
        save_file({name: x.long() for name, x in load_file(path).items()}, path)
    elif change == "bool":
        save_file({name: x > 0 for name, x in load_file(path).items()}, path)
    else:
        path.unlink()
    if change == "broken link":
        path.symlink_to("nowhere")
    with pytest.raises(CheckpointError):
        WAMPolicy.from_pretrained(folder)


# -- robots and statistics of one's own ------------------------------------------------------------


def test_statistics_in_groups_are_joined_in_the_given_order(tmp_path):
    stats = statistics()
    group = stats["action"].pop("default")
    group = {name: [10.0 * i + value for i, value in enumerate(v)] for name, v in group.items()}
    stats["action"] = {
        "gripper": {name: values[6:] for name, values in group.items()},
        "arm": {name: values[:6] for name, values in group.items()},
    }
    path = upstream(tmp_path, tensors(), stats=stats)
    with pytest.raises(CheckpointError, match="groups gripper, arm: name them in the order"):
        WAMPolicy.from_pretrained(path, release=RELEASE)
    for wrong in (("arm",), ("arm", "arm"), ("arm", "gripper", "leg")):
        with pytest.raises(CheckpointError, match="groups gripper, arm"):
            WAMPolicy.from_pretrained(path, release=replace(RELEASE, action_groups=wrong))
    policy = WAMPolicy.from_pretrained(
        path, release=replace(RELEASE, action_groups=("arm", "gripper"))
    )
    low = policy.config.action.normalization.statistics["min"]
    assert low == tuple(group["global_min"])


def own_robot(path):
    preset = presets.PRESETS["libero"]
    layout = {"names": ["a", "b", "c", "d", "e"], "control": "joint_position", "gripper": None}
    content = {
        "cameras": asdict(replace(preset.cameras, names=("top", "side"))),
        "video": {"frames": 9, "stride": 4},
        "state_names": ["x", "y", "z"],
        "layout": layout,
        "normalization": "min_max",
        "horizon": 32,
        "replan": 8,
    }
    path.write_text(json.dumps(content))
    return path


def test_a_file_describes_one_s_own_robot(tmp_path):
    sizes = replace(SIZES, proprio_dim=3, action_dim=5)
    path = upstream(tmp_path, tensors(sizes=sizes), stem="step_010000", stats=statistics(3, 5))
    with pytest.raises(ConfigError, match="describe your own robot in a JSON file"):
        WAMPolicy.from_pretrained(path, release=RELEASE)
    preset = own_robot(tmp_path / "robot.json")
    config = WAMPolicy.from_pretrained(path, release=replace(RELEASE, preset=str(preset))).config
    assert config.cameras.names == ("top", "side")
    assert config.state.names == ("x", "y", "z")
    assert config.action.layout.names == ("a", "b", "c", "d", "e")
    assert config.prompt == presets.PROMPT


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: d.pop("layout"), r"missing \['layout'\]"),
        (lambda d: d.update(robot="mine"), r"unknown \['robot'\]"),
        (lambda d: d.update(horizon="32"), "'preset.horizon': expected int"),
    ],
)
def test_a_file_that_describes_no_robot_is_refused(tmp_path, change, match):
    path = own_robot(tmp_path / "robot.json")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=rf"robot\.json: .*{match}"):
        presets.preset_of("fast_wam", str(path))


# -- prompts ---------------------------------------------------------------------------------------


def test_prompts_are_cleaned_as_the_references_do():
    assert clean_prompt("do: pick  the\nred &amp;amp; blue cup ") == "do: pick the red & blue cup"


def test_a_lerobot_policy_does_not_clean_its_prompts(tmp_path):
    assert not WAMPolicy.from_pretrained(lerobot(tmp_path / "l", tensors())).config.prompt.clean
    path = upstream(tmp_path / "u", tensors())
    assert WAMPolicy.from_pretrained(path, release=RELEASE).config.prompt.clean
