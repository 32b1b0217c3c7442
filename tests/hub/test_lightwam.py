"""Light-WAM's files load as they are published, are written in three forms, and what is wrong with one is said."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from foreign_files import LIGHT, LIGHT_RUN, light_tensors, light_upstream, statistics
from safetensors.torch import load_file, save_file
from stand_in import serving
from tiny import LIGHT_SIZES, TINY_VAE, make_light_policy, make_observation, make_policy

from wam_policy import WAMPolicy
from wam_policy.config import Source
from wam_policy.errors import CheckpointError, ConfigError, WeightsError
from wam_policy.hub import foreign, formats, slim
from wam_policy.hub.convert import ConvertConfig, convert
from wam_policy.hub.info import InfoConfig, info
from wam_policy.hub.sizes import light_sizes
from wam_policy.models.build import build
from wam_policy.models.config import LightWAMConfig
from wam_policy.models.light_wam import trained
from wam_policy.models.vae import build_vae
from wam_policy.presets import LIGHT_PRESETS, LIGHT_WAN, Trained

GIVEN = Trained(preset="libero", head_dim=LIGHT.head_dim)


def run_config(path: str, value) -> dict:
    """The run's configuration with another value at a dotted path."""
    config = copy.deepcopy(LIGHT_RUN)
    *folders, name = path.split(".")
    place = config
    for folder in folders:
        place = place.setdefault(folder, {})
    place[name] = value
    return config


@pytest.fixture
def ours():
    return light_tensors()


# -- upstream's files ---------------------------------------------------------------------------------------------------


def test_a_run_loads_with_the_contract_of_its_config(tmp_path, ours):
    policy = WAMPolicy.from_pretrained(light_upstream(tmp_path, ours), trained=GIVEN)
    found, spec = policy.model.state_dict(), policy.spec
    assert found.keys() == ours.keys() and all(torch.equal(found[name], ours[name]) for name in ours)
    assert spec.model == replace(LIGHT, lora_layers=None) and (spec.family, spec.variant) == ("light_wam", None)
    assert spec.action.supervised_steps == 8 and spec.action.replan == 10 and spec.action.horizon == 32
    assert spec.cameras == LIGHT_PRESETS["libero"].cameras and (spec.cameras.pixels, spec.cameras.resize) == (
        "float",
        "stretch",
    )
    assert spec.vae.repo == spec.text.repo == LIGHT_WAN and spec.precision == "reference" and spec.sampling.action_shift is None


def test_a_run_acts(tmp_path, ours):
    policy = WAMPolicy.from_pretrained(light_upstream(tmp_path, ours), trained=GIVEN, dtype=torch.float32)
    policy._vae = build_vae(TINY_VAE).eval()
    policy.add_prompt("lift", torch.ones(3, 8))
    rng = np.random.default_rng(0)
    pictures = {f"images.{name}": rng.integers(0, 256, (256, 256, 3), np.uint8) for name in ("image", "wrist_image")}
    chunk = policy.predict_chunk({**pictures, "state": np.zeros(8, np.float32), "instruction": "lift"})
    assert chunk.shape == (32, 7) and np.isfinite(chunk).all()


def test_a_run_loads_from_the_hub_with_its_config_and_statistics(tmp_path, ours, monkeypatch):
    with serving(monkeypatch, tmp_path / "cache") as hub:
        run = tmp_path / "run"
        path = light_upstream(run / "libero_spatial", ours)
        hub.repos["lab/light"] = {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()}
        policy = WAMPolicy.from_pretrained(
            "lab/light", filename=str(path.relative_to(run)), trained=GIVEN, cache_dir=tmp_path / "cache"
        )
    assert policy.spec.action.supervised_steps == 8


def test_the_card_says_which_suite_the_checkpoint_is_of(tmp_path, ours):
    path = light_upstream(tmp_path / "run", ours)
    vae = build_vae(TINY_VAE)
    vae.model.save_pretrained(tmp_path / "vae")
    folder = convert(ConvertConfig(src=str(path), dst=tmp_path / "ours", preset="libero", head_dim=12, codec=tmp_path / "vae"))
    card = (folder / "README.md").read_text()
    assert "the suite `libero_spatial` only; there is one checkpoint per suite" in card
    assert "only the first 8 were trained" in card and "sha256" in card


def test_the_real_robot_s_grippers_snap(tmp_path):
    ours = light_tensors(replace(LIGHT, action_dim=14, proprio_dim=14))
    config = run_config("data.train.concat_multi_camera", "robotwin")
    config["data"]["train"]["processor"] |= {"norm_default_mode": "z-score", "proprio_output_dim": 14}
    stats = statistics(14, 14)
    stats["action"]["default"] |= {"global_min": [0.0] * 14, "global_max": [90.0] * 14}
    path = light_upstream(tmp_path, ours, config, stats)
    action = WAMPolicy.from_pretrained(path, trained=replace(GIVEN, preset="real_robot")).spec.action
    raw = np.zeros((1, 14), np.float32)
    raw[0, [6, 13]] = [4.4, 120.7]
    raw[0, 5] = 3.3
    snapped = action.snap.apply(raw, action.normalization)
    assert snapped[0, 6] == 0 and snapped[0, 13] == 90 and snapped[0, 5] == np.float32(3.3)
    robotwin = WAMPolicy.from_pretrained(path, trained=replace(GIVEN, preset="robotwin")).spec
    assert robotwin.action.snap is None and robotwin.cameras.layout == "t"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.wam_adapter.lora_rank", 64, "says lora_rank 64, the weights are of 3: they are of two runs"),
        ("model.wam_adapter.adapter_layer_indices", [0, 9], r"says taps \(0, 9\)"),
        ("model.wam_adapter.lora_target_modules", ["ffn"], "says lora_targets"),
        ("model.wam_adapter.adapter_scale", "${eval:'1 + 1'}", "an expression; write the value it stands for"),
        ("model.state_fusion_action_expert_config.feature_sources", ["delta"], "says features"),
        ("model.state_fusion_action_expert_config.feature_sources", ["velocity"], "unknown features"),
        ("model.apply_video_latent_downsample_to_action_branch", True, "this package reads only False"),
        ("data.train.processor.norm_default_mode", "z-score", "normalises by 'z-score'"),
        ("data.train.processor.proprio_output_dim", 9, "an encoder of 8"),
        ("data.train.num_frames", 17, "windows of 17 steps"),
    ],
)
def test_a_config_that_is_not_the_weights_is_refused(tmp_path, ours, path, value, message):
    with pytest.raises((ConfigError, CheckpointError), match=message):
        WAMPolicy.from_pretrained(light_upstream(tmp_path, ours, run_config(path, value)), trained=GIVEN)


def test_a_canvas_that_does_not_tell_the_robot_asks_for_it(tmp_path, ours):
    path = light_upstream(tmp_path, ours, run_config("data.train.concat_multi_camera", "vertical"))
    with pytest.raises(ConfigError, match=r"say it: --preset libero\|robotwin\|real_robot"):
        WAMPolicy.from_pretrained(path)


def test_a_config_that_holds_code_is_not_executed(tmp_path, ours):
    proof = tmp_path / "executed"
    text = f"model: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{proof}']]\n"
    with pytest.raises(CheckpointError, match="isn't plain data, nothing in it is executed"):
        WAMPolicy.from_pretrained(light_upstream(tmp_path / "run", ours, text), trained=GIVEN)
    assert not proof.exists()


def test_a_run_without_its_config_or_its_state_encoder_is_refused(tmp_path, ours):
    path = light_upstream(tmp_path / "a", ours)
    (tmp_path / "a/config.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.yaml beside .* take the files of its run too"):
        WAMPolicy.from_pretrained(path, trained=GIVEN)
    blind = {name: x for name, x in ours.items() if not name.startswith("proprio_encoder")}
    with pytest.raises(WeightsError, match="would act blindly to its state"):
        WAMPolicy.from_pretrained(light_upstream(tmp_path / "b", blind), trained=GIVEN)


# -- names --------------------------------------------------------------------------------------------------------------


def test_the_full_size_names_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        ours = build(LightWAMConfig(action_dim=7, proprio_dim=8)).state_dict()
    table = formats.light_wam(30)
    theirs = formats.to_theirs(ours, table)
    groups = {
        group: sum(name.startswith(f"{group}.") for name in theirs) for group in ("mot", foreign.LIGHT, "proprio_encoder")
    }
    assert groups == {"mot": 1443, foreign.LIGHT: 70, "proprio_encoder": 2}
    block = "mot.mixtures.video.blocks.29."
    assert list(theirs[f"{block}ffn_lora_out.down_proj.weight"].shape) == [64, 8960]
    assert list(theirs[f"{block}cross_attn.lora_k.up_proj.weight"].shape) == [1536, 64]
    assert list(theirs["mot.mixtures.video.wam_adapters.24.down_proj.weight"].shape) == [256, 1536]
    assert list(theirs[f"{foreign.LIGHT}.layer_poolers.2.adapted.attn.in_proj_weight"].shape) == [4608, 1536]
    assert formats.to_ours(theirs, table).keys() == ours.keys()
    found = light_sizes(ours, 128)
    assert LightWAMConfig(**found) == LightWAMConfig(action_dim=7, proprio_dim=8)


def test_diffusers_names_of_a_wan_dit_are_known_there_and_back(ours):
    video = {name: x for name, x in ours.items() if name.startswith("video.") and ".lora_" not in name}
    table = formats.wan_diffusers(LIGHT.layers)
    theirs = formats.to_theirs(video, table)
    assert {
        "condition_embedder.time_proj.weight",
        "blocks.3.attn2.to_out.0.bias",
        "blocks.0.norm2.weight",
        "proj_out.bias",
    } <= set(theirs)
    assert theirs["scale_shift_table"].shape == (1, 2, 16) and theirs["blocks.1.scale_shift_table"].shape == (1, 6, 16)
    assert formats.to_ours(theirs, table).keys() == video.keys()


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("names", ["original", "diffusers"])
def test_a_raw_wan_dit_becomes_parts_to_train_from(tmp_path, ours, names, prefix):
    video = {name: x for name, x in ours.items() if name.startswith("video.") and ".lora_" not in name}
    table = formats.WAN_DIT if names == "original" else formats.wan_diffusers(LIGHT.layers)
    source = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({prefix + name: x for name, x in formats.to_theirs(video, table).items()}, source)
    folder = convert(ConvertConfig(src=str(source), dst=tmp_path / "base", head_dim=12))
    assert load_file(folder / "model.safetensors").keys() == video.keys()


# -- forms --------------------------------------------------------------------------------------------------------------


def base_folder(tmp_path, policy) -> str:
    """A folder with the policy's frozen video expert, as `wam convert` makes one of Wan's file."""
    tensors = {n: x for n, x in policy.model.state_dict().items() if n.startswith("video.") and ".lora_" not in n}
    raw = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(formats.to_theirs(tensors, formats.WAN_DIT), raw)
    return str(convert(ConvertConfig(src=str(raw), dst=tmp_path / "base", head_dim=12)))


def chunk(policy) -> np.ndarray:
    return policy.predict_chunk(make_observation(side=32))


def test_a_slim_checkpoint_holds_what_was_trained_and_is_assembled_and_verified(tmp_path):
    policy = make_light_policy()
    folder = policy.save_pretrained(tmp_path / "slim", form="slim", base=Source(repo=base_folder(tmp_path, policy)))
    assert all(trained(name) for name in load_file(folder / "model.safetensors"))
    loaded = WAMPolicy.from_pretrained(folder)
    assert np.allclose(chunk(loaded), chunk(policy), atol=1e-6) and loaded.spec.form == "slim"
    again = loaded.save_pretrained(tmp_path / "again", form="slim")  # its base is remembered
    assert np.array_equal(chunk(WAMPolicy.from_pretrained(again)), chunk(loaded))
    assert WAMPolicy.from_pretrained(loaded.save_pretrained(tmp_path / "fat")).spec.form == "fat"


def test_a_slim_checkpoint_in_bfloat16_takes_a_base_in_float32(tmp_path):
    policy = make_light_policy()
    base = base_folder(tmp_path, policy)
    folder = policy.save_pretrained(tmp_path / "slim", dtype=torch.bfloat16, form="slim", base=Source(repo=base))
    loaded = WAMPolicy.from_pretrained(folder).model.state_dict()
    assert all(torch.equal(loaded[n], x.bfloat16().float()) for n, x in policy.model.state_dict().items())


def test_a_raw_wan_folder_is_a_base_too(tmp_path):
    policy = make_light_policy()
    base_folder(tmp_path, policy)
    (tmp_path / "wan").mkdir()
    (tmp_path / "diffusion_pytorch_model.safetensors").rename(tmp_path / "wan/diffusion_pytorch_model.safetensors")
    folder = policy.save_pretrained(tmp_path / "slim", form="slim", base=Source(repo=str(tmp_path / "wan")))
    assert np.allclose(chunk(WAMPolicy.from_pretrained(folder)), chunk(policy), atol=1e-6)


def test_a_base_with_another_hash_is_refused(tmp_path):
    policy = make_light_policy()
    base = base_folder(tmp_path, policy)
    folder = policy.save_pretrained(tmp_path / "slim", form="slim", base=Source(repo=base))
    path = tmp_path / "base/model.safetensors"
    tensors = load_file(path)
    tensors["video.blocks.0.modulation"][0, 0, 0] += 1
    save_file(tensors, path)
    with pytest.raises(WeightsError, match="isn't the one this checkpoint was trained on"):
        WAMPolicy.from_pretrained(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match="download is incomplete"):
        WAMPolicy.from_pretrained(folder)


def test_a_hash_depends_on_every_name_dtype_shape_and_number():
    x = torch.arange(4.0)
    hashes = [
        slim.digest(t) for t in ({"a": x}, {"b": x}, {"a": x.half()}, {"a": x.view(2, 2)}, {"a": x + 1}, {"a": x, "b": x})
    ]
    assert len(set(hashes)) == 6 and slim.digest({"a": x.clone()}) == hashes[0]


def test_a_lean_checkpoint_acts_the_same_and_holds_only_what_acting_needs(tmp_path):
    policy = make_light_policy()
    folder = policy.save_pretrained(tmp_path / "lean", form="lean")
    loaded, names = WAMPolicy.from_pretrained(folder), load_file(folder / "model.safetensors").keys()
    assert np.allclose(chunk(loaded), chunk(policy), atol=1e-5) and loaded.spec.form == "lean"
    assert not [name for name in names if "lora" in name or "head.head" in name or "time" in name or "blocks.3." in name]
    codec = load_file(folder / "vae/diffusion_pytorch_model.safetensors")
    assert not [name for name in codec if name.startswith("decoder")]
    again = WAMPolicy.from_pretrained(loaded.save_pretrained(tmp_path / "again"))
    assert np.array_equal(chunk(again), chunk(loaded))


def test_a_lean_checkpoint_neither_imagines_nor_grows(tmp_path):
    policy = WAMPolicy.from_pretrained(make_light_policy().save_pretrained(tmp_path / "lean", form="lean"))
    with pytest.raises(ConfigError, match="only acts: its video head is gone"):
        policy.imagine(make_observation(side=32))
    with pytest.raises(ConfigError, match="knows 4 steps of a chunk"):
        policy.predict_chunk(make_observation(side=32), horizon=5)
    for form in ("slim", "lean"):
        with pytest.raises(ConfigError, match="only a whole Light-WAM"):
            policy.save_pretrained(tmp_path / "other", form=form)
    with pytest.raises(CheckpointError, match="has no decoder"):
        policy.vae.decode(torch.zeros(1, 4, 1, 4, 8))


def test_forms_a_policy_does_not_have_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="only a whole Light-WAM"):
        make_policy().save_pretrained(tmp_path / "x", form="lean")
    with pytest.raises(ConfigError, match="say where they are"):
        make_light_policy().save_pretrained(tmp_path / "x", form="slim")
    with pytest.raises(ConfigError, match="only a slim checkpoint has a base"):
        make_light_policy().save_pretrained(tmp_path / "x", base=Source(repo="a/b"))
    with pytest.raises(ConfigError, match="unknown form"):
        make_light_policy().save_pretrained(tmp_path / "x", form="thin")
    assert not (tmp_path / "x").exists()


def test_convert_changes_the_form_of_a_checkpoint_of_ours(tmp_path):
    policy = make_light_policy()
    fat, base = policy.save_pretrained(tmp_path / "fat"), base_folder(tmp_path, policy)
    slim_folder = convert(ConvertConfig(src=str(fat), dst=tmp_path / "slim", form="slim", base=base))
    lean_folder = convert(ConvertConfig(src=str(slim_folder), dst=tmp_path / "lean", form="lean"))
    sizes = [(f / "model.safetensors").stat().st_size for f in (fat, slim_folder, lean_folder)]
    assert sizes[1] < sizes[0] and sizes[2] < sizes[0]
    assert np.allclose(chunk(WAMPolicy.from_pretrained(lean_folder)), chunk(policy), atol=1e-5)
    with pytest.raises(CheckpointError, match="is a wam-policy checkpoint already, a fat one"):
        convert(ConvertConfig(src=str(fat), dst=tmp_path / "again"))


def test_convert_compares_a_slim_checkpoint_s_base_before_it_writes(tmp_path):
    policy, other = make_light_policy(), make_light_policy()
    with torch.no_grad():
        other.model.video.blocks[0].modulation += 1
    base = base_folder(tmp_path, other)
    with pytest.raises(WeightsError, match="isn't the one this checkpoint was trained on"):
        convert(ConvertConfig(src=str(policy.save_pretrained(tmp_path / "fat")), dst=tmp_path / "slim", form="slim", base=base))
    assert not (tmp_path / "slim").exists()


def test_info_tells_the_form_and_the_base(tmp_path):
    policy = make_light_policy()
    folder = policy.save_pretrained(tmp_path / "slim", form="slim", base=Source(repo=base_folder(tmp_path, policy)))
    rows = info(InfoConfig(src=str(folder)))
    assert (
        rows["Model"] == "Light-WAM, what was trained" and "sha256" in rows["Base"] and rows["Sampling"] == "one pass, no noise"
    )


def test_a_config_whose_family_is_not_its_model_s_is_refused():
    with pytest.raises(ConfigError, match="the family is 'fast_wam'"):
        make_policy(model=LIGHT_SIZES)
