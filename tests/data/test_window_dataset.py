"""A user's own loop and `wam train` read windows alike: cameras by alias, mapped actions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from recordings import make_writer
from tiny import LAYOUT, TASK, make_policy
from training_data import make_config

from wam_policy.config import CameraConfig
from wam_policy.contract import ActionLayout, Gripper
from wam_policy.data import mixture
from wam_policy.data.encoded_dataset import encode_dataset
from wam_policy.data.lerobot_reader import CONTRACT_PATH, LeRobotDataset
from wam_policy.data.mixture import Mixture
from wam_policy.data.window_dataset import WindowDataset
from wam_policy.errors import ActionError, DatasetError

FRONT = "observation.images.agentview"
WRIST = "observation.images.wrist"
RECORDED = ActionLayout(
    names=("gripper", "delta_y", "delta_x"),
    control="end_effector_delta",
    gripper=Gripper(index=0, open=0.0, closed=1.0),
)


@pytest.fixture
def folder(tmp_path):
    """Two episodes with an alias as a camera's name and with other action columns."""
    rng = np.random.default_rng(0)
    cameras = {FRONT: (16, 16), WRIST: (16, 16)}
    writer = make_writer(tmp_path / "data", cameras, state=("x", "y"), action=RECORDED)
    with writer:
        for length in (6, 5):
            action = rng.uniform(-1, 1, (length, 3))
            action[:, 0] = rng.integers(0, 2, length)
            vectors = {"observation.state": rng.normal(size=(length, 2)), "action": action}
            images = {key: np.full((length, 16, 16, 3), 50, np.uint8) for key in (FRONT, WRIST)}
            images[FRONT] += 10 * np.arange(length, dtype=np.uint8)[:, None, None, None]
            writer.add_episode(TASK, images, vectors)
    return tmp_path / "data"


@pytest.fixture
def policy():
    return make_policy(cameras=CameraConfig(names=("image", "wrist"), height=16, width=16))


def encode(folder, policy):
    config = make_config(folder, None, folder.parent / "run", frames=5)
    return encode_dataset(config, policy.config, Mixture([folder]), policy.vae, policy.prompts)


def in_policy_layout(recorded):
    """Recorded actions [..., 3] in LAYOUT, whose gripper is 1 when open and -1 when closed."""
    gripper, y, x = np.moveaxis(recorded, -1, 0)
    return np.stack([x, y, 1 - 2 * gripper], axis=-1)


def test_a_camera_is_found_by_its_alias_or_by_the_feature_that_is_named(folder, policy):
    frames = LeRobotDataset(folder).read_all_frames(FRONT)
    last = WindowDataset(folder, policy.config)[3]["images.image"]
    assert np.array_equal(last, frames[[3, 4, 5, 5, 5]])
    named = WindowDataset(folder, policy.config, cameras={"wrist": FRONT})[3]
    assert np.array_equal(named["images.wrist"], last)
    assert np.array_equal(named["images.image"], last)
    side = CameraConfig(names=("side",), height=16, width=16)
    with pytest.raises(DatasetError, match="no camera 'side'"):
        WindowDataset(folder, replace(policy.config, cameras=side))


def test_encoding_maps_actions_of_another_layout(folder, policy):
    recorded = LeRobotDataset(folder).vector("action")
    encoded = encode(folder, policy)
    expected = policy.config.action.normalization.normalize(in_policy_layout(recorded))
    assert torch.equal(encoded.action[:, 0], torch.from_numpy(expected))


def test_both_ways_to_read_a_window_give_the_same_actions(folder, policy):
    windows = WindowDataset(folder, policy.config)
    encoded = encode(folder, policy)
    assert len(windows) == len(encoded.names) == 11
    for i, window in enumerate(windows[i] for i in range(len(windows))):
        actions = policy.config.action.normalization.normalize(window["action"].numpy())
        assert torch.equal(encoded.action[i], torch.from_numpy(actions))
        assert torch.equal(encoded.action_is_pad[i], window["action_is_pad"])
    past_the_end = encoded.action[5, 1:]
    assert (past_the_end[:, :2] == 0).all() and (past_the_end[:, 2].abs() == 1).all()


def test_actions_in_the_layout_already_are_not_touched(folder, monkeypatch):
    dataset = Mixture([folder])
    assert dataset.datasets[0].has_action_layout
    monkeypatch.setattr(mixture, "ActionMap", None)
    assert np.array_equal(dataset.actions(RECORDED), dataset.datasets[0].vector("action"))


def test_what_actions_mean_must_be_declared_or_is_taken_from_the_policy(folder, policy):
    (folder / CONTRACT_PATH).unlink()
    with pytest.raises(DatasetError, match="does not declare what its actions mean"):
        WindowDataset(folder, policy.config)
    dataset = Mixture([folder])
    assert not dataset.datasets[0].has_action_layout
    assert np.array_equal(dataset.actions(LAYOUT), dataset.datasets[0].vector("action"))


def test_actions_that_cannot_be_mapped_are_refused(folder, policy):
    velocity = replace(LAYOUT, control="velocity")
    action = replace(policy.config.action, layout=velocity)
    with pytest.raises(ActionError, match="velocity"):
        WindowDataset(folder, replace(policy.config, action=action))


def test_windows_come_from_a_path_a_dataset_or_a_mixture(folder, policy):
    dataset = LeRobotDataset(folder)
    one = WindowDataset(str(folder), policy.config)
    two = WindowDataset(Mixture([dataset, dataset]), policy.config)
    assert len(two) == 2 * len(one) == 2 * len(WindowDataset(dataset, policy.config))
    for name in ("images.image", "state", "action"):
        assert torch.equal(two[len(one) + 2][name], one[2][name])
