"""Checkpoints of other people: names, numbers and tensors are right, or refused by name."""

import json
import zipfile
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from foreign_files import SIZES, lerobot, statistics, tensors, upstream
from safetensors.torch import load_file, save_file
from tiny import make_light_policy, make_observation, make_policy, same, unit_range

from wam_policy import WAMPolicy, presets
from wam_policy.config import Source
from wam_policy.errors import CheckpointError, ConfigError, PromptError, WeightsError
from wam_policy.hub import checksums, components, download, weights
from wam_policy.hub.checkpoint import read_config
from wam_policy.hub.download import DownloadOptions
from wam_policy.hub.foreign import key_mapping, pickles
from wam_policy.hub.info import InfoConfig, info
from wam_policy.models.encoders.text import clean_prompt, untrained_encoder
from wam_policy.normalize import Normalization
from wam_policy.presets import ReleaseInfo

RELEASE = ReleaseInfo(preset="libero", variant="fast", action_shift=5.0, head_dim=SIZES.head_dim)


@pytest.fixture
def folder(tmp_path):
    return make_policy().save_pretrained(tmp_path / "policy")


def change_config(folder, part, **entries):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    (config if part is None else config[part]).update(entries)
    path.write_text(json.dumps(config))


# -- names of tensors ------------------------------------------------------------------------------


def prefixed(mapping, prefix):
    return {prefix + name: x for name, x in mapping.items()}


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d | {"mot": prefixed(d["mot"], "_orig_mod.")},
        lambda d: d | {"proprio_encoder": prefixed(d["proprio_encoder"], "module.")},
        lambda d: {"model": d, "epoch": 3},
        lambda d: {"state_dict": {"module": d}},
        lambda d: (
            d
            | {
                "mot": {
                    name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): x
                    for name, x in prefixed(d["mot"], "_fsdp_wrapped_module.").items()
                }
            }
        ),
    ],
)
def test_names_of_wrapped_modules_are_stripped_wherever_they_stand(tmp_path, change):
    path = upstream(tmp_path, tensors())
    plain = WAMPolicy.from_pretrained(path, release=RELEASE, mmap=False).model.state_dict()
    torch.save(change(torch.load(path, weights_only=True)), path)
    wrapped = WAMPolicy.from_pretrained(path, release=RELEASE).model.state_dict()
    assert all(torch.equal(wrapped[name], x) for name, x in plain.items())


def test_a_tensor_under_two_names_with_two_values_is_refused(tmp_path):
    path = upstream(tmp_path, tensors())
    payload = torch.load(path, weights_only=True)
    encoder = payload["proprio_encoder"]
    payload["proprio_encoder"] = encoder | prefixed(
        {n: x + 1 for n, x in encoder.items()}, "module."
    )
    torch.save(payload, path)
    with pytest.raises(WeightsError, match="twice, with different values"):
        WAMPolicy.from_pretrained(path, release=RELEASE)


@pytest.mark.parametrize("number", ["7", "999999999999", "9" * 5000])
def test_numbers_of_blocks_are_counted_not_trusted(tmp_path, number):
    ours = tensors()
    ours[f"video.blocks.{number}.self_attn.q.weight"] = ours.pop(
        "video.blocks.1.self_attn.q.weight"
    )
    with pytest.raises(WeightsError, match=r"hold 3 blocks, but not number 2"):
        WAMPolicy.from_pretrained(upstream(tmp_path, ours), release=RELEASE)


# -- files of torch.save ---------------------------------------------------------------------------


def rewrite(path, change):
    """Write a zip archive anew, each entry as `change(name, content)` says."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content, compress_type=change(name))


def test_compressed_entries_are_read_right(tmp_path):
    path = upstream(tmp_path, tensors())
    plain = torch.load(path, weights_only=True)
    rewrite(path, lambda name: zipfile.ZIP_DEFLATED if "data/" in name else zipfile.ZIP_STORED)
    read = pickles.read_pickle(path)
    assert all(torch.equal(read["mot"][name], x) for name, x in plain["mot"].items())


def test_a_bit_that_is_flipped_in_a_tensor_is_noticed_by_the_checksum(tmp_path):
    path = upstream(tmp_path, tensors())
    data = bytearray(path.read_bytes())
    weight = torch.load(path, weights_only=True)["proprio_encoder"]["weight"]
    at = data.index(weight.view(torch.uint8).numpy().tobytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=r"checksum of .* does not match"):
        WAMPolicy.from_pretrained(path, release=RELEASE)


def test_a_file_whose_checksums_were_turned_off_is_read(tmp_path):
    path = tmp_path / "weights.pt"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(pickles.read_pickle(path)["a"], torch.ones(3))


@pytest.mark.parametrize(
    ("tensor", "match"),
    [
        (torch.ones(4, 4).to_sparse(), "layout torch.sparse_coo"),
        (torch.ones(4, 4, dtype=torch.complex64), "torch.complex64"),
        (torch.ones(1).expand(10**6), "of fewer numbers"),
        (torch.empty(3, device="meta"), "on meta"),
        (torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8), "torch.qint8"),
    ],
)
def test_tensors_of_other_kinds_are_refused_by_name(tmp_path, tensor, match):
    path = upstream(tmp_path, tensors())
    payload = torch.load(path, weights_only=True)
    payload["mot"]["extra"] = tensor
    torch.save(payload, path)
    with pytest.raises(WeightsError, match=rf"extra is .*{match}|cannot be read"):
        WAMPolicy.from_pretrained(path, release=RELEASE)


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
    change_config(folder, part, **entries)
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


# -- nothing beside a checkpoint runs or is fetched ------------------------------------------------


@pytest.fixture
def text_folder(tmp_path):
    encoder = untrained_encoder(["fly"], 8, 0)
    encoder.model.save_pretrained(tmp_path / "text/text_encoder")
    encoder.tokenizer.save_pretrained(tmp_path / "text/tokenizer")
    return tmp_path / "text"


def load_text(folder):
    here = {"dtype": torch.float32, "device": torch.device("cpu")}
    source = Source(subfolder=folder.name)
    return components.load_text(source, folder.parent, DownloadOptions(), **here)


def test_settings_of_a_text_encoder_that_name_code_are_not_followed(text_folder):
    expected = load_text(text_folder).encode("fly", 8)
    for path in (text_folder / "text_encoder/config.json",):
        content = json.loads(path.read_text())
        content |= {
            "auto_map": {"AutoModel": "elsewhere--model.Model"},
            "attn_implementation": "lab/kernels",
            "_attn_implementation": "lab/kernels",
            "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
            "torch_dtype": "float16",
        }
        path.write_text(json.dumps(content))
    assert torch.equal(load_text(text_folder).encode("fly", 8), expected)


def test_a_tokenizer_that_brings_code_is_refused_without_a_question(text_folder, monkeypatch):
    path = text_folder / "tokenizer/tokenizer_config.json"
    content = json.loads(path.read_text())
    content |= {"auto_map": {"AutoTokenizer": ["tok.Tok", None]}, "tokenizer_class": "Tok"}
    path.write_text(json.dumps(content))
    (text_folder / "tokenizer/tok.py").write_text("raise SystemExit('ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    with pytest.raises(CheckpointError, match="no text encoder"):
        load_text(text_folder)


def test_an_adapter_beside_a_text_encoder_is_refused(text_folder):
    (text_folder / "text_encoder/adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds an adapter"):
        load_text(text_folder)


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"num_layers": 10**9}, "no text encoder has the sizes"),
        ({"num_layers": 3}, "does not match its configuration"),
        ({"d_model": "8"}, "expected int"),
        ({"vocab_size": None}, "expected int"),
    ],
)
def test_sizes_of_a_text_encoder_are_those_of_its_weights(text_folder, entries, match):
    path = text_folder / "text_encoder/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    with pytest.raises(CheckpointError, match=match):
        load_text(text_folder)


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"num_res_blocks": 10**9}, "no video VAE has"),
        ({"dim_mult": [1] * 10_000}, "no video VAE has"),
        ({"base_dim": -4}, "no video VAE has"),
        ({"patch_size": [2]}, "expected int"),
        ({"patch_size": 3}, "`in_channels` must be 27"),
        ({"scale_factor_spatial": 4}, "`scale_factor_spatial` must be 8"),
        ({"temperal_downsample": [True]}, "must be one shorter"),
        ({"latents_std": [1.0, 0.0, 1.0, 1.0]}, "`latents_std` must be 4 possible numbers"),
        ({"latents_mean": [0.0]}, "`latents_mean` must be 4 possible numbers"),
        ({"latents_mean": [None] * 4}, "expected float"),
        ({"mystery": 1}, "pip install -U diffusers"),
    ],
)
def test_a_codec_config_is_judged_before_it_is_built(folder, entries, match):
    path = folder / "vae/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    with pytest.raises(CheckpointError, match=match):
        WAMPolicy.from_pretrained(folder).predict_chunk(make_observation())


def test_a_checkpoint_of_the_hub_names_no_local_folder(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        download, "snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path)
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lab/codec/vae").mkdir(parents=True)
    snapshot = tmp_path / "models--lab--policy/snapshots/abc"
    source = Source(repo="lab/codec", subfolder="vae")
    options = DownloadOptions()
    assert components.component_folder(source, tmp_path, options) == tmp_path.__class__(
        "lab/codec/vae"
    )
    assert asked == []
    components.component_folder(source, snapshot, options)
    assert asked == ["lab/codec"]
    for name in ("/etc", "../codec", "~/codec", "a/b/c"):
        with pytest.raises(CheckpointError, match="no folder or file"):
            components.component_folder(replace(source, repo=name), snapshot, options)


# -- one checkpoint is one version -----------------------------------------------------------------


def test_a_codec_of_another_checkpoint_is_never_used(folder):
    loaded = WAMPolicy.from_pretrained(folder)
    other = make_policy()
    with torch.no_grad():
        for parameter in other.vae.parameters():
            parameter.add_(0.05)
    other.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="was replaced after this policy was loaded"):
        loaded.predict_chunk(make_observation())
    assert np.isfinite(WAMPolicy.from_pretrained(folder).predict_chunk(make_observation())).all()


def test_a_policy_whose_parts_are_loaded_keeps_acting_when_its_folder_is_replaced(folder):
    loaded = WAMPolicy.from_pretrained(folder)
    chunk = loaded.predict_chunk(make_observation())
    action = replace(read_config(folder).action, normalization=unit_range(3, 9.0))
    make_policy(action=action).save_pretrained(folder)
    assert np.allclose(loaded.predict_chunk(make_observation()), chunk, atol=1e-6)


def test_weights_can_be_copied_out_of_their_file(folder):
    mapped = WAMPolicy.from_pretrained(folder)
    copied = WAMPolicy.from_pretrained(folder, mmap=False)
    chunk = copied.predict_chunk(make_observation())
    file = folder / "model.safetensors"
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size - 4000)
        stream.write(bytes(4000))
    assert np.allclose(copied.predict_chunk(make_observation()), chunk, atol=1e-6)
    assert not same(mapped, copied)


# -- checksums -------------------------------------------------------------------------------------


def test_sums_are_those_of_sha256sum_and_are_verified_on_request(folder, capsys):
    sums = checksums.read(folder)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(sums) == files - {"SHA256SUMS"}
    assert same(WAMPolicy.from_pretrained(folder, verify=True), make_policy())
    assert info(InfoConfig(src=str(folder), verify=True))["Verified"].startswith(f"{len(sums)} ")

    change_config(folder, "action", replan=2)
    assert WAMPolicy.from_pretrained(folder).config.action.replan == 2
    with pytest.raises(CheckpointError, match=r"config\.json missing or changed"):
        WAMPolicy.from_pretrained(folder, verify=True)
    with pytest.raises(CheckpointError, match=r"config\.json missing or changed"):
        info(InfoConfig(src=str(folder), verify=True))


def test_what_has_no_sums_cannot_be_verified(folder, tmp_path):
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match="holds no SHA256SUMS"):
        WAMPolicy.from_pretrained(folder, verify=True)
    path = upstream(tmp_path / "u", tensors())
    with pytest.raises(WeightsError, match="records no SHA-256"):
        WAMPolicy.from_pretrained(path, release=RELEASE, verify=True)


def test_text_of_a_checkpoint_is_printed_literally(folder, capsys):
    change_config(folder, None, trained_on="[red]my data[/red] [link=http://x]y")
    change_config(folder, "prompt", template="[bold]{task}[/bold]")
    info(InfoConfig(src=str(folder)))
    assert "[bold]{task}[/bold]" in capsys.readouterr().out


# -- adapters --------------------------------------------------------------------------------------


def write_adapter(folder, base, ours, *, trained=(), **config):
    """Write a LoRA in LeRobot's layout for two layers, and return the merged weights."""
    folder.mkdir()
    content = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2, "lora_alpha": 6.0}
    (folder / "adapter_config.json").write_text(json.dumps(content | config))
    torch.manual_seed(1)
    names = key_mapping.lerobot(SIZES.layers)
    adapter = {}
    merged = {name: x.float() for name, x in ours.items()}
    for path in ("video.blocks.0.self_attn.q", "action.blocks.1.ffn.0"):
        rows, columns = ours[f"{path}.weight"].shape
        down, up = torch.randn(2, columns), torch.randn(rows, 2)
        foreign = next(iter(key_mapping.from_native({f"{path}.": 0}, names)))
        adapter[f"base_model.model.{foreign}lora_A.weight"] = down
        adapter[f"base_model.model.{foreign}lora_B.weight"] = up
        merged[f"{path}.weight"] += 3.0 * up @ down
    for name in trained:
        merged[name] = torch.randn(ours[name].shape)
        (foreign,) = key_mapping.from_native({name: 0}, names)
        adapter[f"base_model.model.{foreign}"] = merged[name]
    save_file(adapter, folder / "adapter_model.safetensors")
    return merged


def test_an_adapter_is_merged_into_its_base(tmp_path):
    ours = tensors(torch.float32)
    base = lerobot(tmp_path / "base", ours)
    trained = ("action.head.weight",)
    merged = write_adapter(tmp_path / "adapter", base, ours, trained=trained)
    policy = WAMPolicy.from_pretrained(tmp_path / "adapter", dtype="float32")
    state = policy.model.state_dict()
    assert state.keys() == merged.keys()
    assert all(torch.allclose(state[name].float(), x, atol=1e-5) for name, x in merged.items())
    assert same_file(base, ours)


def same_file(folder, ours):
    """Whether the base's file still holds its own weights."""
    stored = WAMPolicy.from_pretrained(folder, dtype="float32").model.state_dict()
    return all(torch.equal(stored[name], x) for name, x in ours.items())


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"base_model_name_or_path": "lab/base"}, "an adapter .* of 'lab/base', which cannot be"),
        ({"base_model_name_or_path": None}, "names no base"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias 'all'"),
        ({"r": 0}, "rank 0"),
        ({"r": "2"}, "expected int"),
        ({"r": 3}, "does not fit its base"),
    ],
)
def test_an_adapter_that_cannot_be_merged_says_how_to(tmp_path, monkeypatch, config, match):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    ours = tensors(torch.float32)
    base = lerobot(tmp_path / "base", ours)
    write_adapter(tmp_path / "adapter", base, ours, **config)
    with pytest.raises(WeightsError, match=rf"(?s){match}.*merge_and_unload"):
        WAMPolicy.from_pretrained(tmp_path / "adapter")


def test_an_adapter_of_other_layers_is_refused(tmp_path):
    ours = tensors(torch.float32)
    write_adapter(tmp_path / "adapter", make_light_base(tmp_path), ours)
    with pytest.raises(WeightsError, match="layers that its base does not have"):
        WAMPolicy.from_pretrained(tmp_path / "adapter")


def make_light_base(tmp_path):
    return make_light_policy().save_pretrained(tmp_path / "light")
