"""Several recordings are read as one, and drawn as often as is said."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stand_in import files_of, serving
from training_data import make_codec, make_config, make_data

from wam_policy import WAMPolicy
from wam_policy.data.lerobot_reader import LeRobotDataset
from wam_policy.data.mixture import Mixture
from wam_policy.errors import CheckpointError, ConfigError, DatasetError
from wam_policy.training import trainer
from wam_policy.training.trainer import train

CAMERA = "observation.images.front"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixture")
    first = make_data(root / "first")
    return first, shutil.copytree(first, root / "second")


def test_a_mixture_is_its_parts_one_after_the_other(two):
    both, one = Mixture(two), LeRobotDataset(two[0])
    assert both.length == 2 * one.length and both.instructions() == one.instructions() * 2
    twice = np.concatenate([one.vector("action")] * 2)
    assert np.array_equal(both.actions(one.action_layout()), twice)
    frames = one.read_all_frames(CAMERA)
    for episode, own in zip(both.episodes, one.episodes * 2, strict=True):
        rows = [episode.start, episode.stop - 1]
        assert np.array_equal(
            both.read_frames("front", episode, rows), frames[[own.start, own.stop - 1]]
        )
    assert both.fingerprint() not in (one.sha256, Mixture(two[:1]).fingerprint())


def test_a_recording_comes_from_the_hub_by_its_id(two, tmp_path, monkeypatch):
    files = files_of(two[0])
    with serving(monkeypatch, tmp_path / "cache") as hub:
        hub.repos["lab/demos"] = files | {"train.py": b"print('never')"}
        found = Mixture(("lab/demos",))
        assert found.fingerprint() == Mixture(two[:1]).fingerprint() and not list(
            found.folder.rglob("*.py")
        )
        with pytest.raises(CheckpointError, match="no Hub repository 'lab/nothing'"):
            Mixture(("lab/nothing",))


def test_recordings_of_another_rate_are_refused(two, tmp_path):
    slow = shutil.copytree(two[0], tmp_path / "slow")
    info = json.loads((slow / "meta/info.json").read_text())
    (slow / "meta/info.json").write_text(json.dumps(info | {"fps": info["fps"] / 2}))
    with pytest.raises(DatasetError, match="frames per second"):
        Mixture((two[0], slow))


def test_recordings_that_don_t_go_together_are_refused(two, tmp_path):
    other = shutil.copytree(two[0], tmp_path / "other")
    contract = json.loads((other / "meta/wam_contract.json").read_text())
    contract["action"]["gripper"]["open"] = 7.0
    (other / "meta/wam_contract.json").write_text(json.dumps(contract))
    with pytest.raises(DatasetError, match=r"other: actions .*open=7\.0"):
        Mixture((two[0], other)).action_layout()
    info = json.loads((other / "meta/info.json").read_text())
    info["features"]["observation.state"]["names"][0] = "elsewhere"
    (other / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(DatasetError, match="elsewhere"):
        Mixture((two[0], other))


def test_a_camera_is_found_by_its_name_an_alias_or_where_it_is_said_to_be(two):
    mixture = Mixture(two[:1], {"top": CAMERA})
    assert mixture.frame_size("top") == mixture.frame_size("front")
    libero = SimpleNamespace(
        folder="libero", cameras=["observation.images.agentview", "observation.images.image2"]
    )
    assert [mixture.camera_feature(name, libero) for name in ("image", "wrist_image", "top")] == [
        *libero.cameras,
        CAMERA,
    ]
    with pytest.raises(
        DatasetError, match=r"no camera 'side'; it has .*--camera-map side observation"
    ):
        mixture.camera_feature("side", libero)
    libero.cameras.append("observation.images.agentview_rgb")
    with pytest.raises(DatasetError, match=r"are names of one camera.*--camera-map image"):
        mixture.camera_feature("image", libero)


def test_datasets_are_drawn_as_often_as_their_weights_say(two, tmp_path, monkeypatch):
    drawn, advance = [], trainer.train_step

    def watching(config, state, data, order):
        drawn.append(data.dataset_index[order.batch(state.step)])
        return advance(config, state, data, order)

    monkeypatch.setattr(trainer, "train_step", watching)
    codec = make_codec(two[0], tmp_path / "codec")
    config = make_config(
        two[0], codec, tmp_path / "run", dataset=two, dataset_weights=(9.0, 1.0), steps=30
    )
    assert WAMPolicy.from_pretrained(train(config))
    assert torch.cat(drawn).float().mean() == pytest.approx(0.1, abs=0.07)


def test_weights_that_don_t_fit_the_datasets_are_refused(two, tmp_path):
    with pytest.raises(ConfigError, match="one for each of 2 datasets"):
        make_config(two[0], tmp_path, tmp_path / "run", dataset=two, dataset_weights=(1.0,))


def test_a_mixture_of_nothing_is_refused():
    with pytest.raises(DatasetError, match="no dataset is given"):
        Mixture([])
