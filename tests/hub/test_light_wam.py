"""Light-WAM's own files load, and what is wrong with them is reported."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from foreign_files import LIGHT, LIGHT_RUN, light_tensors, light_upstream, statistics
from safetensors.torch import load_file, save_file
from stand_in import files_of, serving
from tiny import TINY_VAE

from wam_policy import WAMPolicy, images
from wam_policy.errors import CheckpointError, ConfigError, WeightsError
from wam_policy.hub.convert import ConvertConfig, convert
from wam_policy.hub.foreign import identify, key_mapping, light_wam_config
from wam_policy.hub.foreign.shapes import infer_light_config
from wam_policy.models.config import LightWAMConfig
from wam_policy.models.encoders.vae import build_vae
from wam_policy.models.registry import build_model
from wam_policy.presets import LIGHT_PRESETS, LIGHT_WAN, ReleaseInfo

GIVEN = ReleaseInfo(preset="libero", head_dim=LIGHT.head_dim)


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


# -- upstream's files ------------------------------------------------------------------------------


def test_a_run_loads_with_the_contract_of_its_config(tmp_path, ours):
    policy = WAMPolicy.from_pretrained(light_upstream(tmp_path, ours), release=GIVEN)
    state = policy.model.state_dict()
    contract = policy.config
    assert state.keys() == ours.keys()
    assert all(torch.equal(state[name], ours[name]) for name in ours)
    assert contract.model == replace(LIGHT, lora_layers=None) and (
        contract.family,
        contract.variant,
    ) == (
        "light_wam",
        None,
    )
    assert (
        contract.action.supervised_steps == 8
        and contract.action.replan == 10
        and contract.action.horizon == 32
    )
    assert contract.cameras == LIGHT_PRESETS["libero"].cameras and (
        contract.cameras.pixels,
        contract.cameras.resize,
    ) == (
        "float",
        "stretch",
    )
    assert (
        contract.vae.repo == contract.text.repo == LIGHT_WAN
        and contract.precision == "reference"
        and contract.sampling.action_shift is None
    )


def test_a_run_acts(tmp_path, ours):
    policy = WAMPolicy.from_pretrained(
        light_upstream(tmp_path, ours), release=GIVEN, dtype=torch.float32
    )
    policy._vae = build_vae(TINY_VAE).eval()
    policy.add_prompt("lift", torch.ones(3, 8))
    rng = np.random.default_rng(0)
    pictures = {
        f"images.{name}": rng.integers(0, 256, (256, 256, 3), np.uint8)
        for name in ("image", "wrist_image")
    }
    chunk = policy.predict_chunk(
        {**pictures, "state": np.zeros(8, np.float32), "instruction": "lift"}
    )
    assert chunk.shape == (32, 7) and np.isfinite(chunk).all()


def test_a_run_loads_from_the_hub_with_its_config_and_statistics(tmp_path, ours, monkeypatch):
    with serving(monkeypatch, tmp_path / "cache") as hub:
        run = tmp_path / "run"
        path = light_upstream(run / "libero_spatial", ours)
        hub.repos["lab/light"] = files_of(run)
        policy = WAMPolicy.from_pretrained(
            "lab/light",
            filename=str(path.relative_to(run)),
            release=GIVEN,
            cache_dir=tmp_path / "cache",
        )
    assert policy.config.action.supervised_steps == 8


def test_the_card_says_which_suite_the_checkpoint_is_of(tmp_path, ours):
    path = light_upstream(tmp_path / "run", ours)
    vae = build_vae(TINY_VAE)
    vae.model.save_pretrained(tmp_path / "vae")
    folder = convert(
        ConvertConfig(
            src=str(path),
            dst=tmp_path / "ours",
            preset="libero",
            head_dim=12,
            codec=tmp_path / "vae",
        )
    )
    card = (folder / "README.md").read_text()
    assert "the suite libero_spatial only; there is one checkpoint per suite" in card
    assert "only the first 8 were trained" in card and "sha256" in card
    lean = convert(ConvertConfig(src=str(folder), dst=tmp_path / "lean", form="lean"))
    # The contract remembers the training data.
    assert "the suite libero_spatial only" in (lean / "README.md").read_text()


def test_the_real_robot_s_grippers_snap(tmp_path):
    ours = light_tensors(replace(LIGHT, action_dim=14, proprio_dim=14))
    config = run_config("data.train.concat_multi_camera", "robotwin")
    config["data"]["train"]["dataset_dirs"] = ["./data/robotwin2.0"]
    config["data"]["train"]["processor"] |= {
        "norm_default_mode": "z-score",
        "proprio_output_dim": 14,
    }
    stats = statistics(14, 14)
    stats["action"]["default"] |= {"global_min": [0.0] * 14, "global_max": [90.0] * 14}
    path = light_upstream(tmp_path, ours, config, stats)
    action = WAMPolicy.from_pretrained(
        path, release=replace(GIVEN, preset="real_robot")
    ).config.action
    raw = np.zeros((1, 14), np.float32)
    raw[0, [6, 13]] = [4.4, 120.7]
    raw[0, 5] = 3.3
    snapped = action.snap.apply(raw, action.normalization)
    assert snapped[0, 6] == 0 and snapped[0, 13] == 90 and snapped[0, 5] == np.float32(3.3)
    robotwin = WAMPolicy.from_pretrained(path, release=replace(GIVEN, preset="robotwin")).config

    # Without a release from the user, the data's name decides.
    run = light_wam_config.RunFile(tmp_path / "config.yaml")
    release, _ = light_wam_config.run_release(run, None)
    assert release.preset == "robotwin"
    assert robotwin.action.snap is None and robotwin.cameras.layout == "t"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "model.wam_adapter.lora_rank",
            64,
            "has lora_rank 64, but the weights have 3: the two belong to different runs",
        ),
        ("model.wam_adapter.adapter_layer_indices", [0, 9], r"has taps \(0, 9\)"),
        ("model.wam_adapter.lora_target_modules", ["ffn"], "has lora_targets"),
        (
            "model.wam_adapter.adapter_scale",
            "${eval:'1 + 1'}",
            "an expression; replace it by its value",
        ),
        ("model.state_fusion_action_expert_config.feature_sources", ["delta"], "has features"),
        (
            "model.state_fusion_action_expert_config.feature_sources",
            ["velocity"],
            "unknown features",
        ),
        (
            "model.apply_video_latent_downsample_to_action_branch",
            True,
            "this package supports only False",
        ),
        (
            "model.wam_adapter",
            "${adapters.default}",
            "`wam_adapter` in `model.wam_adapter.* is .*, an expression",
        ),
        ("model.loss", "${loss}", "an expression"),
        ("data.train.dataset_dirs", ["${oc.env:DATA}"], "holds an expression"),
        ("model.wam_adapter.lora_alpha", None, "does not set `model.wam_adapter.lora_alpha`"),
        ("model.wam_adapter.adapter_scale", "large", "must be a float, got .large."),
        (
            "model.state_fusion_action_expert_config.feature_sources",
            5,
            "a value of an unexpected type",
        ),
        ("data.train.global_sample_stride", 2, "this package supports only 1"),
        (
            "data.train.processor.norm_exception_mode",
            {"default": "z-score"},
            "this package supports only None",
        ),
        (
            "data.train.processor.norm_default_mode",
            "z-score",
            "is 'z-score', but the preset 'libero' has 'min/max'",
        ),
        ("data.train.processor.proprio_output_dim", 9, "an encoder of 8"),
        ("data.train.num_frames", 17, "is 17, but the preset 'libero' has 33"),
        ("data.train.video_size", [384, 320], r"has \[224, 448\]"),
        ("data.train.concat_multi_camera", "vertical", "has 'horizontal'"),
    ],
)
def test_a_config_that_is_not_the_weights_is_refused(tmp_path, ours, path, value, message):
    with pytest.raises((ConfigError, CheckpointError), match=message):
        WAMPolicy.from_pretrained(
            light_upstream(tmp_path, ours, run_config(path, value)), release=GIVEN
        )


def test_data_that_does_not_tell_the_robot_asks_for_it(tmp_path, ours):
    """The robot is not guessed.

    RoboTwin and the real robot share canvas and normalisation, but not the gripper's rule.
    """
    path = light_upstream(
        tmp_path, ours, run_config("data.train.dataset_dirs", "./data/fold_towels")
    )
    with pytest.raises(
        ConfigError,
        match=r"trained on \['fold_towels'\], which .*--preset libero\|robotwin\|real_robot",
    ):
        WAMPolicy.from_pretrained(path)


def test_taps_in_any_order_are_those_of_the_weights(tmp_path, ours):
    config = run_config("model.wam_adapter.adapter_layer_indices", [2, 0, 2])
    assert WAMPolicy.from_pretrained(
        light_upstream(tmp_path, ours, config), release=GIVEN
    ).config.model.taps == (0, 2)


def test_a_tail_that_counts_is_supervised_too_and_the_caller_may_say_otherwise(tmp_path, ours):
    # Upstream's tail has weight 1 where nothing is configured.
    weighting = {
        "enabled": True,
        "num_prefix_steps": 8,
    }
    path = light_upstream(
        tmp_path, ours, run_config("model.loss.action_temporal_weighting", weighting)
    )
    assert WAMPolicy.from_pretrained(path, release=GIVEN).config.action.supervised_steps is None
    told = replace(GIVEN, supervised_steps=24)
    assert WAMPolicy.from_pretrained(path, release=told).config.action.supervised_steps == 24
    with pytest.raises(ConfigError, match="neither a variant nor an action shift"):
        WAMPolicy.from_pretrained(path, release=replace(GIVEN, variant="fast", action_shift=5.0))


def test_an_old_file_with_the_video_expert_alone_keeps_its_action_head(tmp_path, ours):
    path = light_upstream(tmp_path, ours)
    payload = torch.load(path, weights_only=True)
    payload["dit"] = {n.removeprefix("mixtures.video."): x for n, x in payload.pop("mot").items()}
    torch.save(payload, path)
    found = WAMPolicy.from_pretrained(path, release=GIVEN).model.state_dict()
    assert all(torch.equal(found[name], ours[name]) for name in ours)


def test_robotwin_s_pictures_are_resized_twice_as_in_training():
    cameras = LIGHT_PRESETS["robotwin"].cameras
    pictures = {
        name: np.random.default_rng(0).integers(0, 256, (1, 480, 640, 3), np.uint8)
        for name in cameras.names
    }
    twice = images.compose_canvas(pictures, cameras)
    first = {
        name: images.resize_images(x, 240, 320, "stretch", pixels="float")
        for name, x in pictures.items()
    }
    assert np.array_equal(twice, images.compose_canvas(first, replace(cameras, before=None)))
    assert not np.allclose(
        twice, images.compose_canvas(pictures, replace(cameras, before=None)), atol=1
    )


def test_a_run_without_a_state_is_one_where_the_caller_says_so(tmp_path, ours):
    blind = {name: x for name, x in ours.items() if not name.startswith("proprio_encoder")}
    path = light_upstream(
        tmp_path, blind, run_config("data.train.processor.proprio_output_dim", None)
    )
    with pytest.raises(WeightsError, match="holds no proprio encoder"):
        WAMPolicy.from_pretrained(path, release=GIVEN)
    assert (
        WAMPolicy.from_pretrained(path, release=replace(GIVEN, proprio=False)).config.state is None
    )


def test_a_config_that_holds_code_is_not_executed(tmp_path, ours):
    proof = tmp_path / "executed"
    apply = "!!python/object/apply:pathlib.Path"
    text = f"model: {apply}.touch [{apply} ['{proof}']]\n"
    with pytest.raises(CheckpointError, match="is not plain data, and nothing in it is executed"):
        WAMPolicy.from_pretrained(light_upstream(tmp_path / "run", ours, text), release=GIVEN)
    assert not proof.exists()


def test_a_run_without_its_config_or_its_state_encoder_is_refused(tmp_path, ours):
    path = light_upstream(tmp_path / "a", ours)
    (tmp_path / "a/config.yaml").unlink()
    with pytest.raises(
        CheckpointError, match=r"no config\.yaml beside .* copy the files of its run too"
    ):
        WAMPolicy.from_pretrained(path, release=GIVEN)
    blind = {name: x for name, x in ours.items() if not name.startswith("proprio_encoder")}
    with pytest.raises(WeightsError, match="would ignore its state"):
        WAMPolicy.from_pretrained(light_upstream(tmp_path / "b", blind), release=GIVEN)


# -- names -----------------------------------------------------------------------------------------


def test_the_full_size_names_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        ours = build_model(LightWAMConfig(action_dim=7, proprio_dim=8)).state_dict()
    table = key_mapping.light_wam(30)
    theirs = key_mapping.from_native(ours, table)
    groups = {
        group: sum(name.startswith(f"{group}.") for name in theirs)
        for group in ("mot", identify.LIGHT, "proprio_encoder")
    }
    assert groups == {"mot": 1443, identify.LIGHT: 70, "proprio_encoder": 2}
    block = "mot.mixtures.video.blocks.29."
    assert list(theirs[f"{block}ffn_lora_out.down_proj.weight"].shape) == [64, 8960]
    assert list(theirs[f"{block}cross_attn.lora_k.up_proj.weight"].shape) == [1536, 64]
    assert list(theirs["mot.mixtures.video.wam_adapters.24.down_proj.weight"].shape) == [256, 1536]
    assert list(theirs[f"{identify.LIGHT}.layer_poolers.2.adapted.attn.in_proj_weight"].shape) == [
        4608,
        1536,
    ]
    assert key_mapping.to_native(theirs, table).keys() == ours.keys()
    found = infer_light_config(ours, 128)
    assert LightWAMConfig(**found) == LightWAMConfig(action_dim=7, proprio_dim=8)


def test_diffusers_names_of_a_wan_dit_are_known_there_and_back(ours):
    video = {
        name: x for name, x in ours.items() if name.startswith("video.") and ".lora_" not in name
    }
    table = key_mapping.wan_diffusers(LIGHT.layers)
    theirs = key_mapping.from_native(video, table)
    assert {
        "condition_embedder.time_proj.weight",
        "blocks.3.attn2.to_out.0.bias",
        "blocks.0.norm2.weight",
        "proj_out.bias",
    } <= set(theirs)
    assert theirs["scale_shift_table"].shape == (1, 2, 16) and theirs[
        "blocks.1.scale_shift_table"
    ].shape == (1, 6, 16)
    assert key_mapping.to_native(theirs, table).keys() == video.keys()


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("names", ["original", "diffusers"])
def test_a_raw_wan_dit_becomes_parts_to_train_from(tmp_path, ours, names, prefix):
    video = {
        name: x for name, x in ours.items() if name.startswith("video.") and ".lora_" not in name
    }
    table = key_mapping.WAN_DIT if names == "original" else key_mapping.wan_diffusers(LIGHT.layers)
    source = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(
        {prefix + name: x for name, x in key_mapping.from_native(video, table).items()}, source
    )
    folder = convert(ConvertConfig(src=str(source), dst=tmp_path / "base", head_dim=12))
    assert load_file(folder / "model.safetensors").keys() == video.keys()
