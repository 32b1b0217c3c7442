"""Checkpoints of other projects load as they are published, and errors are reported."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from foreign_files import LAYOUTS, LIBERO, RELEASE, SIZES, lerobot, statistics, tensors, upstream
from safetensors.torch import load_file, save_file
from stand_in import serving
from tiny import TINY_VAE

from wam_policy import WAMPolicy
from wam_policy.errors import CheckpointError, ConfigError, WeightsError
from wam_policy.hub.foreign import key_mapping
from wam_policy.models.encoders.vae import build_vae
from wam_policy.presets import PRESETS, RELEASES, WAN


def observation() -> dict:
    rng = np.random.default_rng(0)
    pictures = {
        f"images.{name}": rng.integers(0, 256, (256, 256, 3), np.uint8)
        for name in ("image", "wrist_image")
    }
    return {**pictures, "state": np.zeros(8, np.float32), "instruction": "lift"}


def holds(policy: WAMPolicy, ours: dict) -> bool:
    state = policy.model.state_dict()
    return state.keys() == ours.keys() and all(
        torch.equal(state[name], x.to(state[name].dtype)) for name, x in ours.items()
    )


@pytest.fixture
def ours():
    return tensors()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_upstream_file_loads_in_its_own_dtype_with_the_contract_of_its_preset(tmp_path, dtype):
    ours = tensors(dtype)
    policy = WAMPolicy.from_pretrained(upstream(tmp_path, ours), release=RELEASE)
    assert policy.dtype == dtype and holds(policy, ours)
    assert (
        policy.config.cameras == PRESETS["libero"].cameras
        and policy.config.precision == "reference"
    )
    assert policy.config.action.normalization.statistics == {"min": (-2.0,) * 7, "max": (2.0,) * 7}


def test_a_foreign_policy_acts(tmp_path, ours):
    policy = WAMPolicy.from_pretrained(
        upstream(tmp_path, ours), release=RELEASE, dtype=torch.float32
    )
    policy._vae = build_vae(TINY_VAE).eval()
    policy.add_prompt("lift", torch.ones(3, 8))
    chunk = policy.predict_chunk(observation())
    assert chunk.shape == (32, 7) and np.isfinite(chunk).all()


def test_a_release_is_known_by_its_name_and_keeps_its_own_shift():
    assert RELEASES["libero_optional_idm_2cam224"].action_shift == 1.0
    assert RELEASES["libero_optional_idm_2cam224"].variant == "optional_idm"


def test_a_file_nobody_knows_asks_for_what_it_does_not_say(tmp_path, ours):
    with pytest.raises(
        CheckpointError,
        match=r"step_000100\.pt does not record what it was.*--preset libero\|robotwin",
    ):
        WAMPolicy.from_pretrained(upstream(tmp_path, ours, "step_000100"))


def test_a_file_loads_from_a_hub_repository_of_several_and_nothing_else_is_fetched(
    tmp_path, ours, monkeypatch
):
    with serving(monkeypatch, tmp_path / "cache") as hub:
        path = upstream(tmp_path / "release", ours)
        hub.repos["lab/fastwam"] = {p.name: p.read_bytes() for p in path.parent.iterdir()} | {
            "robotwin.pt": b"12 GB"
        }
        policy = WAMPolicy.from_pretrained(
            "lab/fastwam", filename=path.name, release=RELEASE, cache_dir=tmp_path / "cache"
        )
        assert holds(policy, ours) and not any(
            "robotwin.pt" in r and r.startswith("GET /lab") for r in hub.requests
        )
        with pytest.raises(CheckpointError, match=r"has no file 'other\.pt'"):
            WAMPolicy.from_pretrained(
                "lab/fastwam", filename="other.pt", release=RELEASE, cache_dir=tmp_path / "cache"
            )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lerobot_folders_of_both_layouts_load_with_their_own_contract(tmp_path, ours, layout):
    policy = WAMPolicy.from_pretrained(lerobot(tmp_path / "lr", ours, layout))
    assert holds(policy, ours)
    contract = policy.config
    assert contract.cameras.names == ("image", "wrist_image") and (
        contract.cameras.height,
        contract.cameras.width,
    ) == (224, 224)
    assert (contract.cameras.resize, contract.cameras.pixels) == ("stretch", "float")
    assert contract.video == PRESETS["libero"].video and contract.action.replan == 10
    assert contract.action.layout == PRESETS["libero"].layout
    assert (
        contract.action.normalization.rule == "lerobot"
        and contract.state.normalization.mode == "min_max"
    )
    assert contract.vae.repo == contract.text.repo == WAN


def test_a_picture_composed_of_robotwin_s_three_cameras_is_composed_here(tmp_path):
    ours = tensors(sizes=replace(SIZES, action_dim=14, proprio_dim=14))
    one = {"observation.images.image": {"type": "VISUAL", "shape": [3, 384, 320]}}
    changes = {"image_size": [384, 320], "input_features": one, "toggle_action_dimensions": []}
    changes |= {"action_dim": 14, "proprio_dim": 14}
    contract = WAMPolicy.from_pretrained(
        lerobot(tmp_path / "lr", ours, dims=(14, 14), **changes)
    ).config
    assert (
        contract.cameras == PRESETS["robotwin"].cameras
        and contract.action.layout == PRESETS["robotwin"].layout
    )


def test_pictures_that_would_be_normalised_twice_are_normalised_once(tmp_path, ours):
    once = WAMPolicy.from_pretrained(lerobot(tmp_path / "once", ours))
    twice = WAMPolicy.from_pretrained(lerobot(tmp_path / "twice", ours, visual="MEAN_STD"))
    assert once.config == twice.config


def test_a_baked_in_tokenizer_path_is_replaced(tmp_path, ours):
    policy = WAMPolicy.from_pretrained(lerobot(tmp_path / "lr", ours, tokenizer_model_id="."))
    assert policy.config.text.repo == WAN


def test_a_gripper_that_is_not_toggled_is_libero_s_own(tmp_path, ours):
    policy = WAMPolicy.from_pretrained(lerobot(tmp_path / "lr", ours, toggle_action_dimensions=[]))
    gripper = policy.config.action.layout.gripper
    assert (gripper.open, gripper.closed, gripper.binary) == (-1.0, 1.0, False)


def test_another_robot_s_numbers_keep_the_names_the_file_gives(tmp_path):
    ours = tensors(sizes=replace(SIZES, action_dim=3, proprio_dim=None))
    changes = {
        "action_feature_names": ["a", "b", "c"],
        "toggle_action_dimensions": [],
        "action_dim": 3,
        "proprio_dim": None,
    }
    policy = WAMPolicy.from_pretrained(lerobot(tmp_path / "lr", ours, dims=(8, 3), **changes))
    assert policy.config.action.layout.names == ("a", "b", "c") and policy.config.state is None


# -- what is refused -------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return print, ("code was run",)


def test_a_file_that_holds_code_is_refused_and_the_code_not_run(tmp_path, capsys):
    torch.save({"mot": Evil()}, tmp_path / f"{LIBERO}.pt")
    with pytest.raises(WeightsError, match="holds code"):
        WAMPolicy.from_pretrained(tmp_path / f"{LIBERO}.pt")
    assert "code was run" not in capsys.readouterr().out


def test_a_libero_file_without_statistics_is_refused(tmp_path, ours):
    path = upstream(tmp_path, ours)
    path.with_name(f"{LIBERO}_dataset_stats.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"no statistics at .*without them actions mean nothing"
    ):
        WAMPolicy.from_pretrained(path, release=RELEASE)


def test_statistics_beside_the_file_may_have_the_folder_s_name(tmp_path, ours):
    path = upstream(tmp_path, ours)
    path.with_name(f"{LIBERO}_dataset_stats.json").rename(tmp_path / "dataset_stats.json")
    assert holds(WAMPolicy.from_pretrained(path, release=RELEASE), ours)


@pytest.mark.parametrize("stats", [statistics(action=6), statistics(state=7), {"state": {}}, {}])
def test_statistics_that_do_not_fit_are_refused(tmp_path, ours, stats):
    with pytest.raises(CheckpointError, match=r"(does not hold the|holds no) statistics"):
        WAMPolicy.from_pretrained(upstream(tmp_path, ours, stats=stats), release=RELEASE)


def test_a_preset_of_another_robot_is_refused(tmp_path, ours):
    trained = replace(RELEASE, preset="robotwin")
    with pytest.raises(ConfigError, match="not trained for the preset 'robotwin'"):
        WAMPolicy.from_pretrained(upstream(tmp_path, ours), release=trained)


def test_mixed_dtypes_are_refused_by_name(tmp_path, ours):
    ours["action.head.bias"] = ours["action.head.bias"].float()
    with pytest.raises(
        WeightsError, match=r"must store one dtype.*bfloat16.*float32 \(action\.head\.bias\)"
    ):
        WAMPolicy.from_pretrained(upstream(tmp_path, ours), release=RELEASE)


@pytest.mark.parametrize("change", ["missing", "unexpected", "misshapen"])
def test_weights_are_checked_strictly(tmp_path, ours, change):
    if change == "missing":
        del ours["video.blocks.1.norm3.bias"]
    elif change == "unexpected":
        ours["video.blocks.1.norm9.bias"] = ours["video.blocks.1.norm3.bias"]
    else:
        ours["video.blocks.1.norm3.bias"] = torch.zeros(5, dtype=torch.bfloat16)
    with pytest.raises(WeightsError, match=change):
        WAMPolicy.from_pretrained(upstream(tmp_path, ours), release=RELEASE)


def test_a_lerobot_folder_of_another_policy_is_refused(tmp_path, ours):
    with pytest.raises(
        CheckpointError, match="LeRobot policy of type 'act'; this package reads 'fastwam'"
    ):
        WAMPolicy.from_pretrained(lerobot(tmp_path / "lr", ours, type="act"))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"use_relative_actions": True}, "`use_relative_actions` is True"),
        ({"toggle_action_dimensions": [5, 6]}, "several grippers"),
        ({"image_size": [224, 447]}, "447 wide cannot hold 2 cameras"),
        ({"prompt_template": "lift it"}, "hold {task} once"),
        ({"input_features": None}, "incomplete"),
        ({"torch_dtype": "int8"}, "unknown dtype"),
    ],
)
def test_lerobot_settings_that_would_change_the_policy_are_refused(tmp_path, ours, changes, match):
    with pytest.raises((CheckpointError, ConfigError), match=match):
        WAMPolicy.from_pretrained(lerobot(tmp_path / "lr", ours, **changes))


@pytest.mark.parametrize("name", ["policy_preprocessor.json", "policy_postprocessor.json"])
def test_a_lerobot_folder_without_processors_is_refused(tmp_path, ours, name):
    folder = lerobot(tmp_path / "lr", ours)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        WAMPolicy.from_pretrained(folder)


def test_lerobot_statistics_that_are_missing_are_not_passed_over(tmp_path, ours):
    folder = lerobot(tmp_path / "lr", ours)
    file = folder / "policy_postprocessor_step_1_unnormalizer_processor.safetensors"
    stats = load_file(file)
    del stats["action.min"]
    save_file(stats, file)
    with pytest.raises(
        CheckpointError, match="action is normalised by min_max, but its min is missing"
    ):
        WAMPolicy.from_pretrained(folder)


def test_pictures_normalised_by_anything_else_are_refused(tmp_path, ours):
    with pytest.raises(
        CheckpointError, match=r"observation\.images\.\w+ is normalised by min_max, but"
    ):
        WAMPolicy.from_pretrained(lerobot(tmp_path / "range", ours, visual="MIN_MAX"))
    folder = lerobot(tmp_path / "imagenet", ours, visual="MEAN_STD")
    file = folder / "policy_preprocessor_step_1_normalizer_processor.safetensors"
    save_file(
        load_file(file) | {"observation.images.image.mean": torch.full((3, 1, 1), 0.456)}, file
    )
    with pytest.raises(
        CheckpointError,
        match=r"normalises the images of 'observation\.images\.image' by z_score.*IDENTITY",
    ):
        WAMPolicy.from_pretrained(folder)


def test_a_partial_checkpoint_can_t_act(tmp_path, ours):
    base = {
        n: x
        for n, x in ours.items()
        if not n.startswith(("action.action_encoder", "action.head", "proprio"))
    }
    with pytest.raises(
        WeightsError, match=r"holds no policy but a part.*wam train --pretrained-path"
    ):
        WAMPolicy.from_pretrained(lerobot(tmp_path / "base", base, "legacy"))


def test_weights_without_their_proprio_encoder_would_act_blindly_and_are_refused(tmp_path, ours):
    blind = {name: x for name, x in ours.items() if not name.startswith("proprio_encoder")}
    with pytest.raises(
        WeightsError,
        match=r"holds no proprio encoder, but the policy was trained with one.*proprio=False",
    ):
        WAMPolicy.from_pretrained(upstream(tmp_path / "a", blind), release=RELEASE)
    with pytest.raises(WeightsError, match="`proprio_dim` is 8, the weights have no such part"):
        WAMPolicy.from_pretrained(lerobot(tmp_path / "b", blind))
    told = WAMPolicy.from_pretrained(
        upstream(tmp_path / "a", blind), release=replace(RELEASE, proprio=False)
    )
    assert told.config.state is None
    with pytest.raises(
        WeightsError, match="holds a proprio encoder, but the policy was trained without one"
    ):
        WAMPolicy.from_pretrained(
            upstream(tmp_path / "c", ours), release=replace(RELEASE, proprio=False)
        )


def test_statistics_of_a_run_are_found_above_the_weights_or_where_the_caller_says(tmp_path, ours):
    path = upstream(tmp_path / "run/checkpoints", ours)
    beside = path.with_name(f"{path.stem}_dataset_stats.json")
    run = tmp_path / "run/dataset_stats.json"
    beside.rename(run)
    # A folder above that is no run's may hold another policy's statistics.
    with pytest.raises(CheckpointError, match="no statistics at"):
        WAMPolicy.from_pretrained(path, release=RELEASE)
    (tmp_path / "run/config.yaml").write_text("")
    found = WAMPolicy.from_pretrained(path, release=RELEASE)
    run.rename(tmp_path / "elsewhere.json")
    assert (
        WAMPolicy.from_pretrained(path, release=RELEASE, stats=tmp_path / "elsewhere.json").config
        == found.config
    )


def postprocessor(folder, step: dict) -> None:
    path = folder / "policy_postprocessor.json"
    data = json.loads(path.read_text())
    data["steps"].append(step)
    path.write_text(json.dumps(data))


def test_the_saved_toggle_counts_whatever_the_config_says(tmp_path, ours):
    folder = lerobot(tmp_path / "lr", ours, toggle_action_dimensions=[])
    postprocessor(
        folder,
        {"registry_name": "fastwam_action_toggle_processor", "config": {"toggle_dimensions": [-1]}},
    )
    assert WAMPolicy.from_pretrained(folder).config.action.layout == PRESETS["libero"].layout


def test_a_gripper_of_zeros_and_ones_that_nothing_toggles_is_refused(tmp_path, ours):
    folder = lerobot(tmp_path / "lr", ours, toggle_action_dimensions=[])
    path = folder / "policy_postprocessor_step_1_unnormalizer_processor.safetensors"
    stats = load_file(path)
    stats["action.min"][-1] = 0.0
    save_file(stats, path)
    with pytest.raises(
        CheckpointError,
        match=r"begin at 0, so 0 is closed, but nothing toggles them.*should be \[6\]",
    ):
        WAMPolicy.from_pretrained(folder)


def test_what_is_said_of_a_folder_that_says_it_itself_is_not_swallowed(tmp_path, ours, policy):
    lerobot(tmp_path / "lr", ours)
    own = policy.save_pretrained(tmp_path / "own")
    with pytest.raises(ConfigError, match="holds its own configuration and statistics"):
        WAMPolicy.from_pretrained(own, stats=tmp_path / "x.json")
    folder = tmp_path / "lr"
    for said in ({"release": RELEASE}, {"stats": tmp_path / "x.json"}):
        with pytest.raises(ConfigError, match="holds its own configuration and statistics"):
            WAMPolicy.from_pretrained(folder, **said)


def test_lerobot_s_one_shift_is_that_of_both_schedules(tmp_path, ours):
    sampling = WAMPolicy.from_pretrained(
        lerobot(tmp_path / "lr", ours, sigma_shift=2.0)
    ).config.sampling
    assert (sampling.video_shift, sampling.action_shift) == (2.0, 2.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_features": {}}, "names no camera"),
        ({"torch_dtype": None}, r"config\.json is incomplete"),
        ({"image_size": None}, r"config\.json is incomplete"),
    ],
)
def test_a_lerobot_config_with_holes_is_refused(tmp_path, ours, changes, message):
    with pytest.raises((CheckpointError, ConfigError), match=message):
        WAMPolicy.from_pretrained(lerobot(tmp_path / "lr", ours, **changes))


def test_lerobot_s_processors_with_holes_or_renamed_cameras_are_refused(tmp_path, ours):
    path = lerobot(tmp_path / "lr", ours) / "policy_preprocessor.json"
    whole = json.loads(path.read_text())
    swap = {"observation.images.image": "observation.images.wrist_image"}
    for change, message in (
        ({"rename_map": swap}, "cameras would be swapped"),
        (None, "holds no statistics"),
    ):
        data = json.loads(json.dumps(whole))
        if change is None:
            del data["steps"][1]["config"]["norm_map"]
        else:
            data["steps"][0]["config"] = change
        path.write_text(json.dumps(data))
        with pytest.raises(CheckpointError, match=message):
            WAMPolicy.from_pretrained(tmp_path / "lr")


def test_an_env_s_names_that_lerobot_renames_do_not_matter_here(tmp_path, ours):
    path = lerobot(tmp_path / "lr", ours) / "policy_preprocessor.json"
    data = json.loads(path.read_text())
    data["steps"][0]["config"] = {
        "rename_map": {"observation.images.top": "observation.images.image"}
    }
    path.write_text(json.dumps(data))
    assert WAMPolicy.from_pretrained(tmp_path / "lr").config.cameras.names == (
        "image",
        "wrist_image",
    )


def test_a_file_of_something_else_is_refused(tmp_path):
    torch.save({"layer.weight": torch.zeros(1)}, tmp_path / f"{LIBERO}.pt")
    with pytest.raises(WeightsError, match="none of the models this package knows"):
        WAMPolicy.from_pretrained(tmp_path / f"{LIBERO}.pt")
    (tmp_path / f"{LIBERO}.pt").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(WeightsError, match=r"cannot be read|holds code, or is not a file"):
        WAMPolicy.from_pretrained(tmp_path / f"{LIBERO}.pt")


def test_an_accelerate_dump_that_names_everything_three_times_loads(tmp_path, ours):
    upstream_names = key_mapping.from_native(ours)
    dump = dict(upstream_names)
    for name, x in upstream_names.items():
        dump[
            name.replace("mot.mixtures.video.", "video_expert.").replace(
                "mot.mixtures.action.", "action_expert."
            )
        ] = x
        dump[name.replace("mot.", "dit.")] = x
    path = upstream(tmp_path, ours)
    torch.save({f"module.{name}": x for name, x in dump.items()}, path)
    assert holds(WAMPolicy.from_pretrained(path, release=RELEASE), ours)
    dump["video_expert.head.head.bias"] = dump["video_expert.head.head.bias"] + 1
    torch.save(dump, path)
    with pytest.raises(WeightsError, match="twice, with different values"):
        WAMPolicy.from_pretrained(path, release=RELEASE)


def test_what_a_lerobot_config_leaves_out_has_lerobot_s_defaults(tmp_path, ours):
    folder = lerobot(tmp_path / "lr", ours)
    whole = WAMPolicy.from_pretrained(folder).config
    config = json.loads((folder / "config.json").read_text())
    for name in (
        "n_obs_steps",
        "sigma_shift",
        "video_scheduler",
        "action_scheduler",
        "text_cfg_scale",
        "tokenizer_max_len",
    ):
        del config[name]
    (folder / "config.json").write_text(json.dumps(config))
    assert WAMPolicy.from_pretrained(folder).config == whole
