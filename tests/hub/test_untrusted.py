"""A checkpoint is one version, what it says is checked, and nothing beside it runs."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from foreign_files import RELEASE, tensors, upstream
from tiny import change_config, make_observation, make_policy, same, unit_range

from wam_policy import WAMPolicy
from wam_policy.config import Source
from wam_policy.errors import CheckpointError, WeightsError
from wam_policy.hub import checksums, components, download
from wam_policy.hub.checkpoint import read_config
from wam_policy.hub.download import DownloadOptions
from wam_policy.hub.info import InfoConfig, info
from wam_policy.models.encoders.text import untrained_encoder


@pytest.fixture
def folder(tmp_path):
    return make_policy().save_pretrained(tmp_path / "policy")


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
    assert set(sums) == files - {"SHA256SUMS", "README.md"}
    assert same(WAMPolicy.from_pretrained(folder, verify=True), make_policy())
    assert info(InfoConfig(src=str(folder), verify=True))["Verified"].startswith(f"{len(sums)} ")

    change_config(folder, lambda config: config["action"].update(replan=2))
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
    change_config(folder, lambda c: c.update(trained_on="[red]my data[/red] [link=http://x]y"))
    change_config(folder, lambda c: c["prompt"].update(template="[bold]{task}[/bold]"))
    info(InfoConfig(src=str(folder)))
    assert "[bold]{task}[/bold]" in capsys.readouterr().out
