"""A dataset that LeRobot's own classes wrote is read equal, frame for frame."""

import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from recordings import make_writer

from wam_policy.contract import ActionLayout
from wam_policy.data.lerobot_reader import LeRobotDataset

CAMERA = "observation.images.front"
# LeRobot's dataset classes need other versions than this package: an environment of their own.
PACKAGES = (
    ("torch==2.13.0",),
    ("lerobot-dataset==0.4.4",),
    ("--no-deps", "torchcodec==0.13.0"),
)


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The Python of an environment with LeRobot; `LEROBOT_PYTHON` names one that is there."""
    if there := os.environ.get("LEROBOT_PYTHON"):
        return there
    venv = tmp_path_factory.mktemp("lerobot") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    for wanted in PACKAGES:
        subprocess.run([str(venv / "bin/pip"), "install", "-q", *wanted], check=True)
    return str(venv / "bin/python")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_lerobot_wrote_is_read_back_equal(python, tmp_path):
    # LeRobot reads what this package wrote, the number of a vector of one included.
    layout = ActionLayout(names=("torque",), control="joint_torque", gripper=None)
    writer = make_writer(tmp_path / "ours", {CAMERA: (64, 96)}, action=layout)
    torque = np.arange(5, dtype=np.float32)[:, None]
    shown = np.full((5, 64, 96, 3), 100, np.uint8)
    with writer:
        writer.add_episode("swing", {CAMERA: shown}, {"action": torque})

    script = Path(__file__).with_name("lerobot_script.py")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    subprocess.run(
        [python, str(script), str(tmp_path), str(tmp_path / "ours")],
        check=True,
        env=environment,
        capture_output=True,
    )
    read = np.load(tmp_path / "other.npz")
    assert np.array_equal(read["action"].reshape(5, 1), torque)
    assert read["tasks"].tolist() == ["swing"]

    kept, dataset = np.load(tmp_path / "kept.npz"), LeRobotDataset(tmp_path / "data")
    assert [(e.task, e.stop - e.start) for e in dataset.episodes] == [
        ("task 0", 20),
        ("task 1", 12),
        ("task 0", 16),
    ]
    assert dataset.instructions() == ["task 0"] * 20 + ["task 1"] * 12 + ["task 0"] * 16
    assert np.array_equal(dataset.vector("observation.state"), kept["state"])
    assert np.array_equal(dataset.vector("action"), kept["action"])
    force = [t for length in (20, 12, 16) for t in range(length)]
    assert np.array_equal(dataset.vector("observation.force")[:, 0], force)
    assert dataset.names["action"] == ("delta_x", "delta_y", "gripper")
    frames = dataset.read_all_frames(CAMERA)
    with av.open(str(next(tmp_path.glob("data/videos/*/*/*.mp4")))) as container:
        decoded = np.stack(
            [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        )
    assert np.array_equal(frames, decoded)
    # AV1 is lossy, but the next frame is 10 away.
    assert np.abs(frames.astype(int) - kept["frames"]).max() <= 4
    episode = dataset.episodes[1]
    some = dataset.read_frames(CAMERA, episode, [episode.start + 3, episode.stop - 1])
    assert np.array_equal(some, frames[[episode.start + 3, episode.stop - 1]])
