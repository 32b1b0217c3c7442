"""Frozen encoders are loaded at first use, from the checkpoint or from another repository."""

import shutil

import pytest
import torch
from tiny import TINY_VAE, make_observation, make_policy, same

from wam_policy import WAMPolicy
from wam_policy.config import Source
from wam_policy.errors import CheckpointError, ConfigError
from wam_policy.hub import components
from wam_policy.hub.download import PATTERNS
from wam_policy.models.encoders.text import PromptEmbeddings, untrained_encoder
from wam_policy.models.encoders.vae import build_vae

WORDS = ["do: touch the cube", "do: lift the cube"]


@pytest.fixture
def speaking(tmp_path):
    """The folder of a policy that brings its text encoder and an empty table of prompts."""
    policy = make_policy(text=Source(subfolder="text"))
    length = policy.config.prompt.token_length
    policy.prompts = PromptEmbeddings(
        {},
        token_length=length,
        text_dim=8,
        load_encoder=lambda: untrained_encoder(WORDS, 8, seed=0),
    )
    return policy.save_pretrained(tmp_path / "speaking")


def test_a_checkpoint_can_bring_its_text_encoder(speaking):
    policy = WAMPolicy.from_pretrained(speaking)
    chunks = [
        policy.predict_chunk(make_observation(task=task))
        for task in ("touch the cube", "lift the cube")
    ]
    assert not torch.allclose(*map(torch.from_numpy, chunks))
    expected = untrained_encoder(WORDS, 8, seed=0).encode(WORDS[0], 5)
    assert torch.allclose(policy.prompts.table[WORDS[0]], expected, atol=1e-6)


def test_known_prompts_never_load_the_encoder(speaking):
    policy = WAMPolicy.from_pretrained(speaking)
    policy.add_prompt("touch the cube")
    policy.save_pretrained(speaking)
    shutil.rmtree(speaking / "text" / components.TOKENIZER)
    policy = WAMPolicy.from_pretrained(speaking)
    policy.predict_chunk(make_observation())
    with pytest.raises(CheckpointError, match="no text encoder in"):
        policy.predict_chunk(make_observation(task="lift the cube"))


def test_the_codec_is_loaded_when_it_is_first_needed(policy, tmp_path):
    folder = policy.save_pretrained(tmp_path / "checkpoint")
    shutil.move(folder / "vae", tmp_path / "elsewhere")
    loaded = WAMPolicy.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="no video VAE in"):
        loaded.predict_chunk(make_observation())
    shutil.move(tmp_path / "elsewhere", folder / "vae")
    assert same(loaded, policy)


def test_the_codec_can_live_in_another_repository(tmp_path, monkeypatch):
    policy = make_policy(vae=Source(repo="lab/codec", subfolder="vae", revision="v1"))
    own = make_policy().save_pretrained(tmp_path / "codec")
    asked = []

    def locate(name, download, patterns, *, may_be_local):
        asked.append((name, download.revision, patterns))
        return own

    monkeypatch.setattr(components, "resolve_folder", locate)
    folder = policy.save_pretrained(tmp_path / "checkpoint")
    assert not (folder / "vae").exists()
    assert same(WAMPolicy.from_pretrained(folder), policy)
    assert asked == [("lab/codec", "v1", [f"vae/{pattern}" for pattern in PATTERNS])]


def test_the_codec_s_decoder_is_loaded_when_it_is_first_needed(policy, tmp_path):
    folder = policy.save_pretrained(tmp_path / "checkpoint")
    loaded = WAMPolicy.from_pretrained(folder)
    loaded.predict_chunk(make_observation())
    decoder = loaded.vae.model.decoder
    assert all(p.device.type == "meta" for p in decoder.parameters())
    frames = loaded.imagine(make_observation()).frames
    assert all(p.device.type == "cpu" for p in decoder.parameters())
    assert (frames == policy.imagine(make_observation()).frames).mean() > 0.99


def test_a_policy_whose_decoder_was_never_needed_is_saved_whole(policy, tmp_path):
    loaded = WAMPolicy.from_pretrained(policy.save_pretrained(tmp_path / "first"))
    loaded.predict_chunk(make_observation())
    again = WAMPolicy.from_pretrained(loaded.save_pretrained(tmp_path / "second"))
    again.imagine(make_observation())


def test_a_dropped_text_encoder_comes_back_when_it_is_needed(speaking):
    policy = WAMPolicy.from_pretrained(speaking)
    policy.predict_chunk(make_observation(task="touch the cube"))
    first = policy.prompts.encoder
    policy.drop_text_encoder()
    policy.predict_chunk(make_observation(task="touch the cube"))
    assert policy.prompts._encoder is None
    policy.predict_chunk(make_observation(task="lift the cube"))
    assert policy.prompts._encoder is not None and policy.prompts._encoder is not first


def test_the_text_encoder_can_live_on_another_device(speaking):
    policy = WAMPolicy.from_pretrained(speaking, text_device="meta")
    assert policy.device.type == "cpu" and policy.prompts.encoder.model.device.type == "meta"


@pytest.mark.parametrize(
    ("capability", "dtype"), [("AVX2", torch.float32), ("AVX512", torch.bfloat16)]
)
def test_the_codec_computes_in_float32_where_the_cpu_has_no_short_floats(
    policy, tmp_path, monkeypatch, capability, dtype
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    loaded = WAMPolicy.from_pretrained(
        policy.save_pretrained(tmp_path / "checkpoint"), dtype=torch.bfloat16
    )
    assert loaded.dtype == torch.bfloat16 and loaded.vae.model.dtype == dtype
    picture = torch.rand(1, 3, 16, 32, dtype=torch.bfloat16) * 2 - 1
    with torch.no_grad():
        latents = loaded.vae.encode_first_frame(picture)
        assert latents.dtype == torch.bfloat16
        assert torch.allclose(
            latents.float(), policy.vae.encode_first_frame(picture.float()), atol=0.1
        )


def test_entries_of_released_codecs_that_diffusers_does_not_know_are_left_out_and_others_refused():
    assert (
        build_vae(
            TINY_VAE | {"clip_output": False, "_class_name": "AutoencoderKLWan"}
        ).spatial_ratio
        == 8
    )
    with pytest.raises(ConfigError, match=r"holds \['new_thing'\], .*: pip install -U diffusers"):
        build_vae(TINY_VAE | {"new_thing": 1})
