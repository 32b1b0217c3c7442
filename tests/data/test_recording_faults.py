"""A recording that is killed, doubled or cannot be completed loses and mixes nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from recordings import make_writer

from wam_policy.data import lerobot_writer
from wam_policy.data.lerobot_reader import LeRobotDataset
from wam_policy.errors import DatasetError

CAMERA = "observation.images.front"
CAMERAS = {CAMERA: (16, 16)}


def add_episode(writer, value=0):
    frames = np.full((3, 16, 16, 3), value, np.uint8)
    writer.add_episode("touch", {CAMERA: frames}, {"action": np.zeros((3, 3))})


def test_two_recordings_into_one_folder_are_not_mixed(tmp_path):
    with make_writer(tmp_path / "data", CAMERAS) as writer:
        add_episode(writer)
        with pytest.raises(DatasetError, match="in use by a live run"):
            make_writer(tmp_path / "data", CAMERAS)
    assert LeRobotDataset(tmp_path / "data").length == 3
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert not (tmp_path / "data/run.lock").exists()


def test_what_a_killed_recording_left_is_removed_by_the_next_one(tmp_path):
    partial = tmp_path / "data.partial"
    (partial / "videos/x").mkdir(parents=True)
    (partial / "run.lock").write_text("")
    with make_writer(tmp_path / "data", CAMERAS) as writer:
        add_episode(writer)
    assert LeRobotDataset(tmp_path / "data").length == 3
    assert not partial.exists() and not (tmp_path / "data/videos/x").exists()


def test_a_recording_that_cannot_be_moved_is_kept_and_named(tmp_path):
    with (
        pytest.raises(DatasetError, match=r"what was recorded is in .*data\.partial"),
        make_writer(tmp_path / "data", CAMERAS) as writer,
    ):
        add_episode(writer)
        (tmp_path / "data").mkdir()
        (tmp_path / "data/file").write_text("in the way")
    assert LeRobotDataset(tmp_path / "data.partial").length == 3
    (tmp_path / "data/file").unlink()
    (tmp_path / "data").rmdir()
    with pytest.raises(DatasetError, match="is a complete recording that could not be moved"):
        make_writer(tmp_path / "data", CAMERAS)
    (tmp_path / "data.partial").rename(tmp_path / "data")
    assert LeRobotDataset(tmp_path / "data").length == 3


def test_a_table_that_cannot_be_written_keeps_the_recording(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lerobot_writer, "_write_table", full)
    with (
        pytest.raises(DatasetError, match=r"cannot be completed .*No space left"),
        make_writer(tmp_path / "data", CAMERAS) as writer,
    ):
        add_episode(writer)
    assert list((tmp_path / "data.partial").rglob("*.mp4"))


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match="cannot be recorded"):
        make_writer(tmp_path / "file/data", CAMERAS)


def children_of(process: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
        except OSError:
            continue
        if f"\nPPid:\t{process}\n" in text:
            found.append(int(status.parent.name))
    return found


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_a_recording_that_is_ended_takes_its_workers_along(tmp_path, ending):
    command = [sys.executable, "-m", "wam_policy.cli", "record", "--env", "tiny:Faulty-v0"]
    command += ["--tasks", "touch", "50", "--env-kwargs", "fault", "slow"]
    command += ["--output-dir", str(tmp_path / "data"), "--num-workers", "2"]
    tests = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(tests), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    workers = []
    while len(workers) < 3 and time.monotonic() < deadline:  # two, and what tracks resources
        workers = children_of(process.pid)
        time.sleep(0.2)
    time.sleep(2)
    workers = children_of(process.pid)
    assert len(workers) >= 3
    process.send_signal(ending)
    process.wait(timeout=30)
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "workers outlive the recording"
        time.sleep(0.2)
    assert not (tmp_path / "data").exists()
