"""Files that are damaged or of another form are reported as errors of the package, by name."""

import json

import pytest
import torch
import yaml
from foreign_files import (
    LIGHT,
    LIGHT_RUN,
    lerobot,
    light_tensors,
    light_upstream,
    tensors,
    upstream,
)
from safetensors.torch import save_file

from wam_policy import WAMPolicy
from wam_policy.config import Source
from wam_policy.errors import CheckpointError, ConfigError, PromptError, WeightsError
from wam_policy.hub import components
from wam_policy.hub.convert import ConvertConfig
from wam_policy.hub.download import DownloadOptions
from wam_policy.hub.foreign import wan
from wam_policy.hub.foreign.shapes import infer_config, infer_light_config
from wam_policy.hub.info import InfoConfig, info
from wam_policy.hub.prompt_cache import PromptCache
from wam_policy.hub.upload import upload_folder
from wam_policy.presets import ReleaseInfo


@pytest.fixture
def ours():
    return tensors()


# -- weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["[1]", '{"weight_map": ["a"]}', "{}", '{"weight_map": 3}'])
def test_an_index_of_another_form_is_refused(policy, tmp_path, content):
    folder = policy.save_pretrained(tmp_path / "policy")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(WeightsError, match=r"index\.json (is not a safetensors index|must hold a)"):
        WAMPolicy.from_pretrained(folder)


def test_a_shard_whose_name_is_no_text_is_refused(policy, tmp_path):
    folder = policy.save_pretrained(tmp_path / "policy")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 5}}')
    with pytest.raises(WeightsError, match="must name the file of each tensor"):
        WAMPolicy.from_pretrained(folder)


@pytest.mark.parametrize("content", [{"model_state": [1]}, {1: torch.ones(1)}, {1: 2, "a": 3}])
def test_a_pickle_of_another_form_is_refused(tmp_path, content):
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    with pytest.raises(WeightsError, match=r"expected weights by name|none of the layouts"):
        WAMPolicy.from_pretrained(path)


def test_a_file_that_is_cut_is_refused(tmp_path, ours):
    path = upstream(tmp_path, ours)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError, match=path.name):
        WAMPolicy.from_pretrained(path)


def test_a_partial_light_wam_is_refused():
    ours = light_tensors()
    without_video = {name: x for name, x in ours.items() if not name.startswith("video.")}
    with pytest.raises(WeightsError, match="hold no video expert"):
        infer_light_config(without_video, LIGHT.head_dim)

    prefix = "expert.layer_poolers.0."
    without_pooler = {name: x for name, x in ours.items() if not name.startswith(prefix)}
    with pytest.raises(WeightsError, match="no query pooler"):
        infer_light_config(without_pooler, LIGHT.head_dim)


@pytest.mark.parametrize("head_dim", [0, -12])
def test_a_head_width_that_is_not_positive_is_refused(ours, head_dim):
    with pytest.raises(WeightsError, match="pass another `head_dim`"):
        infer_config(ours, head_dim)


def test_parts_of_wan_that_are_incomplete_or_unknown_are_refused():
    with pytest.raises(WeightsError, match="text encoder are incomplete"):
        wan.text_encoder({"token_embedding.weight": torch.ones(3)})
    with pytest.raises(WeightsError, match="video VAE are incomplete"):
        wan.video_vae({})


# -- configurations --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"action_dit_config": [1]},
        {"action_dit_config": {"attn_head_dim": None}},
        {"action_video_freq_ratio": 0},
        {"image_size": None},
    ],
)
def test_a_lerobot_config_of_another_form_is_refused(tmp_path, ours, changes):
    folder = lerobot(tmp_path / "policy", ours, **changes)
    with pytest.raises(CheckpointError, match=r"config\.json is incomplete or damaged"):
        WAMPolicy.from_pretrained(folder)


@pytest.mark.parametrize("steps", [None, 3, [None], [{"registry_name": "normalizer_processor"}]])
def test_a_lerobot_processor_of_another_form_is_refused(tmp_path, ours, steps):
    folder = lerobot(tmp_path / "policy", ours)
    (folder / "policy_preprocessor.json").write_text(json.dumps({"steps": steps}))
    with pytest.raises(CheckpointError, match=r"policy_preprocessor\.json"):
        WAMPolicy.from_pretrained(folder)


def test_a_light_wam_run_with_datasets_of_another_form_is_refused(tmp_path):
    run = yaml.safe_load(yaml.safe_dump(LIGHT_RUN))
    run["data"]["train"]["dataset_dirs"] = 5
    path = light_upstream(tmp_path, light_tensors(), run)
    release = ReleaseInfo(preset="libero", head_dim=LIGHT.head_dim)
    with pytest.raises(ConfigError, match="dataset_dirs` must be a list, got 5"):
        WAMPolicy.from_pretrained(path, release=release)


@pytest.mark.parametrize("content", ["[]", "3", "{"])
def test_a_codec_config_of_another_form_is_refused(tmp_path, content):
    (tmp_path / "codec").mkdir()
    (tmp_path / "codec/config.json").write_text(content)
    here = {"dtype": torch.float32, "device": torch.device("cpu")}
    with pytest.raises(CheckpointError, match="no video VAE"):
        components.load_vae(Source(subfolder="codec"), tmp_path, DownloadOptions(), **here)


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"sizes": 3}'])
def test_a_part_whose_config_is_damaged_is_refused(tmp_path, content):
    (tmp_path / "base.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"base\.json (is|must) .* convert the part again"):
        info(InfoConfig(src=str(tmp_path)))


# -- requests --------------------------------------------------------------------------------------


def test_a_folder_of_files_asks_for_the_file_s_name(tmp_path, ours):
    upstream(tmp_path, ours)
    release = ReleaseInfo(preset="libero", variant="fast", action_shift=5.0)
    with pytest.raises(CheckpointError, match="filename"):
        WAMPolicy.from_pretrained(tmp_path, release=release)


def test_a_file_name_inside_a_file_is_refused(tmp_path, ours):
    path = upstream(tmp_path, ours)
    with pytest.raises(CheckpointError, match=r"is a file: leave out the file name 'other\.pt'"):
        WAMPolicy.from_pretrained(path, filename="other.pt")


def test_a_revision_without_a_base_is_refused(tmp_path):
    config = ConvertConfig(src="lab/policy", dst=tmp_path / "out", base_revision="main")
    with pytest.raises(ConfigError, match="pass --base too"):
        config.checkpoint_request()


def test_an_upload_that_does_not_reach_the_hub_says_so(policy, tmp_path, monkeypatch):
    folder = policy.save_pretrained(tmp_path / "policy")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    options = {"token": False, "private": None, "revision": None, "create_pr": False}
    with pytest.raises(CheckpointError, match="check the network"):
        upload_folder(folder, "lab/tiny", commit_message="Upload", **options)


# -- prompt caches ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        torch.ones(3, 8),
        {"context": torch.ones(3, 8), "mask": torch.ones(5)},
        {"context": torch.ones(3, 8), "mask": [1, 1, 0]},
    ],
)
def test_a_cached_prompt_of_another_form_is_refused(tmp_path, content):
    cache = PromptCache(tmp_path, 3)
    cache.put("fly", torch.ones(2, 8))
    (native,) = tmp_path.glob("*.safetensors")
    torch.save(content, native.with_name(f"{native.stem}.wan.pt"))
    native.unlink()
    with pytest.raises(PromptError, match="is broken, remove it"):
        cache.get("fly")


def test_a_cached_prompt_of_our_own_without_its_tensor_is_refused(tmp_path):
    cache = PromptCache(tmp_path, 3)
    cache.put("fly", torch.ones(2, 8))
    (native,) = tmp_path.glob("*.safetensors")
    save_file({"other": torch.ones(1)}, native)
    with pytest.raises(PromptError, match="is broken, remove it"):
        cache.get("fly")
