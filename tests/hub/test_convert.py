"""`wam convert` keeps the weights; a failure leaves the source and no destination."""

import dataclasses
import hashlib
import json
import resource
from contextlib import contextmanager

import pytest
import torch
from foreign_files import LAYOUTS, LIBERO, SIZES, lerobot, tensors, upstream
from safetensors.torch import load_file, save_file
from test_load import holds
from tiny import TINY_VAE
from transformers import UMT5Config, UMT5EncoderModel

from wam_policy import WAMPolicy
from wam_policy.cli import main
from wam_policy.config import Source
from wam_policy.errors import CheckpointError, ConfigError, WeightsError
from wam_policy.hub import components
from wam_policy.hub.convert import ConvertConfig, convert
from wam_policy.hub.download import DownloadOptions
from wam_policy.hub.foreign import key_mapping
from wam_policy.models.encoders.text import untrained_encoder
from wam_policy.models.encoders.vae import build_vae
from wam_policy.presets import WAN

SAID = {"preset": "libero", "variant": "fast", "action_shift": 5.0, "head_dim": SIZES.head_dim}
HERE = {"dtype": torch.float32, "device": torch.device("cpu")}


@pytest.fixture
def ours():
    return tensors()


@pytest.fixture
def source(tmp_path, ours):
    return upstream(tmp_path / "upstream", ours)


def test_an_upstream_file_becomes_a_checkpoint_and_the_card_says_where_from(tmp_path, ours, source):
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    folder = convert(ConvertConfig(src=str(source), dst=tmp_path / "ours", sha256=digest, **SAID))
    policy = WAMPolicy.from_pretrained(folder)
    assert holds(policy, ours) and policy.config.dtype == "bfloat16"
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "SHA256SUMS",
        "config.json",
        "model.safetensors",
    ]
    card = (folder / "README.md").read_text()
    assert digest in card and "preset `libero`" in card and "upstream `.pt`" in card
    assert f"`{LIBERO}_dataset_stats.json`" in card and f"`{WAN}`" in card


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_lerobot_folder_becomes_the_same_checkpoint_whatever_its_layout(tmp_path, ours, layout):
    theirs = lerobot(tmp_path / "lr", ours, layout, tokenizer_model_id=".")
    folder = convert(ConvertConfig(src=str(theirs), dst=tmp_path / "ours"))
    assert holds(WAMPolicy.from_pretrained(folder), ours)
    card = (folder / "README.md").read_text()
    assert "policy_preprocessor.json" in card and "names '.'" in card


def test_the_card_says_that_pictures_are_normalised_once(tmp_path, ours):
    folder = convert(
        ConvertConfig(
            src=str(lerobot(tmp_path / "lr", ours, visual="MEAN_STD")), dst=tmp_path / "ours"
        )
    )
    assert "would do it a second time" in (folder / "README.md").read_text()


def test_a_checkpoint_goes_back_to_either_project_s_names(tmp_path, ours, source):
    folder = convert(ConvertConfig(src=str(source), dst=tmp_path / "ours", **SAID))
    stored = load_file(folder / "model.safetensors")
    back = upstream(tmp_path / "back", stored)
    assert holds(
        WAMPolicy.from_pretrained(
            convert(ConvertConfig(src=str(back), dst=tmp_path / "again", **SAID))
        ),
        ours,
    )


def test_weights_are_stored_and_computed_in_the_dtype_asked_for(tmp_path, ours, source):
    folder = convert(ConvertConfig(src=str(source), dst=tmp_path / "ours", dtype="float32", **SAID))
    assert {x.dtype for x in load_file(folder / "model.safetensors").values()} == {torch.float32}
    assert WAMPolicy.from_pretrained(folder).dtype == torch.float32


def test_a_checkpoint_with_its_frozen_parts_inside_acts_without_the_hub(
    tmp_path, source, monkeypatch
):
    build_vae(TINY_VAE).model.save_pretrained(tmp_path / "codec")
    speaker = untrained_encoder(["lift the cube"], 8, seed=0)
    speaker.model.save_pretrained(tmp_path / "text" / components.TEXT_ENCODER)
    speaker.tokenizer.save_pretrained(tmp_path / "text" / components.TOKENIZER)
    folder = convert(
        ConvertConfig(
            src=str(source),
            dst=tmp_path / "ours",
            dtype="float32",
            codec=tmp_path / "codec",
            text_encoder=tmp_path / "text",
            **SAID,
        )
    )
    monkeypatch.setattr(components, "resolve_folder", None)
    from test_load import observation

    policy = WAMPolicy.from_pretrained(folder)
    assert policy.predict_chunk(observation()).shape == (32, 7)
    policy.drop_text_encoder()
    policy.predict_chunk(observation())
    assert "`codec`, copied into this checkpoint" in (folder / "README.md").read_text()


# -- parts -----------------------------------------------------------------------------------------


def parts(ours: dict) -> dict[str, dict]:
    """Contents of the files that hold a part of a policy."""
    fresh = ("action_encoder.", "head.")
    video = {n.removeprefix("video."): x for n, x in ours.items() if n.startswith("video.")}
    action = {n.removeprefix("action."): x for n, x in ours.items() if n.startswith("action.")}
    backbone = {n: x for n, x in action.items() if not n.startswith(fresh)}
    return {
        "raw.safetensors": video,
        "legacy.pt": {"dit": video},
        "action.pt": {
            "policy": "linear",
            "backbone_state_dict": backbone,
            "meta": {"hidden_dim": 12},
        },
    }


@pytest.mark.parametrize("name", ["raw.safetensors", "legacy.pt", "action.pt"])
def test_a_part_becomes_a_folder_to_train_from_that_can_t_act(tmp_path, ours, name):
    content = parts(ours)[name]
    save_file(content, tmp_path / name) if name.endswith("safetensors") else torch.save(
        content, tmp_path / name
    )
    folder = convert(
        ConvertConfig(src=str(tmp_path / name), dst=tmp_path / "base", head_dim=SIZES.head_dim)
    )
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(stored[n], ours[n]) for n in stored)
    base = json.loads((folder / "base.json").read_text())
    sizes = json.loads(json.dumps(dataclasses.asdict(SIZES)))
    assert base["sizes"] and all(sizes[name] == size for name, size in base["sizes"].items())
    with pytest.raises(
        CheckpointError, match=r"only parts of a policy.*wam train --pretrained-path"
    ):
        WAMPolicy.from_pretrained(folder)


def test_raw_wan_shards_become_a_folder_to_train_from(tmp_path, ours):
    from wam_policy.hub import weights

    (tmp_path / "wan").mkdir()
    weights.write_weights(
        tmp_path / "wan",
        parts(ours)["raw.safetensors"],
        "diffusion_pytorch_model",
        shard_bytes=2000,
    )
    (tmp_path / "wan" / "config.json").write_text('{"_class_name": "WanModel"}')
    folder = convert(
        ConvertConfig(src=str(tmp_path / "wan"), dst=tmp_path / "base", head_dim=SIZES.head_dim)
    )
    assert set(load_file(folder / "model.safetensors")) == {
        n for n in ours if n.startswith("video.")
    }
    next((tmp_path / "wan").glob("*-00002-of-*")).unlink()
    with pytest.raises(WeightsError, match="lacks the shards"):
        convert(
            ConvertConfig(
                src=str(tmp_path / "wan"), dst=tmp_path / "base2", head_dim=SIZES.head_dim
            )
        )


# -- the frozen parts' original files --------------------------------------------------------------


@pytest.mark.parametrize("residual", [True, False], ids=["wan2.2", "wan2.1"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_an_original_codec_becomes_diffusers_and_encodes_the_same(tmp_path, residual, wrapped):
    config = {
        **TINY_VAE,
        "dim_mult": [1, 2, 2, 2],
        "num_res_blocks": 2,
        "temperal_downsample": [False, True, True],
    }
    config |= {
        "z_dim": 48,
        "scale_factor_spatial": 16,
        "latents_mean": [0.0] * 48,
        "latents_std": [1.0] * 48,
    }
    if not residual:
        plain = {
            "patch_size": None,
            "in_channels": 3,
            "out_channels": 3,
            "scale_factor_spatial": 8,
            "is_residual": False,
        }
        config |= plain | {"z_dim": 16, "latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}
    torch.manual_seed(0)
    vae = build_vae(config).eval()
    theirs = key_mapping.from_native(
        vae.model.state_dict(), key_mapping.wan_vae(4, 2, residual=residual)
    )
    torch.save(
        {"model_state": {f"model.{n}": x for n, x in theirs.items()}} if wrapped else theirs,
        tmp_path / "Wan_VAE.pth",
    )
    folder = convert(ConvertConfig(src=str(tmp_path / "Wan_VAE.pth"), dst=tmp_path / "codec"))
    loaded = components.load_vae(Source(subfolder="codec"), tmp_path, DownloadOptions(), **HERE)
    loaded.load_decoder()
    state = loaded.model.state_dict()
    expected = vae.model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert float(loaded.mean.flatten()[0]) == pytest.approx(-0.2289 if residual else -0.7571)
    clip = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    raw = vae.encode(clip)
    with torch.no_grad():
        assert torch.allclose(loaded.encode(clip) * loaded.std + loaded.mean, raw, atol=1e-5)
    assert (folder / "README.md").is_file()


def test_an_original_text_encoder_becomes_transformers_with_its_tokenizer(tmp_path):
    speaker = untrained_encoder(["lift the cube"], 32, seed=0)
    vocabulary = len(speaker.tokenizer)
    config = UMT5Config(
        vocab_size=vocabulary, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2
    )
    torch.manual_seed(0)
    model = UMT5EncoderModel(config).eval()
    names = {n: x for n, x in model.state_dict().items() if n != "encoder.embed_tokens.weight"}
    torch.save(key_mapping.from_native(names, key_mapping.umt5(2)), tmp_path / "t5.pth")
    with pytest.raises(CheckpointError, match="pass --tokenizer FOLDER"):
        convert(ConvertConfig(src=str(tmp_path / "t5.pth"), dst=tmp_path / "text"))
    assert not (tmp_path / "text").exists()
    speaker.tokenizer.save_pretrained(tmp_path / "google" / "umt5-xxl")
    convert(ConvertConfig(src=str(tmp_path / "t5.pth"), dst=tmp_path / "text"))
    loaded = components.load_text(Source(subfolder="text"), tmp_path, DownloadOptions(), **HERE)
    ids = torch.tensor([[3, 4, 1]])
    with torch.no_grad():
        assert torch.allclose(
            loaded.model(ids).last_hidden_state, model(ids).last_hidden_state, atol=1e-6
        )
    assert loaded.encode("lift the cube", 8).shape == (4, 32)


# -- what goes wrong -------------------------------------------------------------------------------


def test_another_file_than_the_one_wanted_is_refused(tmp_path, source):
    with pytest.raises(CheckpointError, match="is not the expected file"):
        convert(ConvertConfig(src=str(source), dst=tmp_path / "ours", sha256="0" * 64, **SAID))
    assert not (tmp_path / "ours").exists()


def test_an_existing_destination_is_refused(tmp_path, source):
    with pytest.raises(CheckpointError, match="exists already"):
        convert(ConvertConfig(src=str(source), dst=source.parent, **SAID))


def test_our_own_checkpoint_needs_no_converting(policy, tmp_path):
    folder = policy.save_pretrained(tmp_path / "ours")
    with pytest.raises(CheckpointError, match="a wam-policy checkpoint already"):
        convert(ConvertConfig(src=str(folder), dst=tmp_path / "again"))


def test_half_said_is_refused(tmp_path, source):
    for said in (
        {"variant": "fast"},
        {"preset": "libero", "variant": "fast"},
        {"action_shift": 5.0},
    ):
        with pytest.raises(ConfigError, match="pass all of"):
            convert(ConvertConfig(src=str(source), dst=tmp_path / "ours", **said))
    with pytest.raises(
        CheckpointError,
        match=r"does not record what it was trained for.*--variant … --action-shift",
    ):
        # A preset alone is enough only for a Light-WAM.
        convert(ConvertConfig(src=str(source), dst=tmp_path / "ours", preset="libero"))


@contextmanager
def full_disk(size: int):
    """No file may grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_source_and_no_destination(tmp_path, source):
    before = source.read_bytes()
    with (
        full_disk(8192),
        pytest.raises(CheckpointError, match=r"cannot write .*what was there before is unchanged"),
    ):
        convert(ConvertConfig(src=str(source), dst=tmp_path / "ours", **SAID))
    assert source.read_bytes() == before and not (tmp_path / "ours").exists()


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    tmp_path, source, monkeypatch
):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(CheckpointError, match=r"needs .* GiB, the disk has 0\.0 GiB left"):
        convert(ConvertConfig(src=str(source), dst=tmp_path / "new" / "ours", **SAID))
    assert not (tmp_path / "new").exists()


def test_the_command_says_what_is_wrong_in_one_line(tmp_path, capsys):
    assert main(["convert", str(tmp_path / "none.pt"), str(tmp_path / "ours")]) == 1
    assert "no folder or file" in capsys.readouterr().err
