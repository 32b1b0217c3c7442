"""Frames of other people's datasets are the right ones, or refused by file and time."""

import io
import os
import signal
import time
from fractions import Fraction

import av
import numpy as np
import pyarrow as pa
import pytest
from foreign_datasets import (
    CAMERA,
    frames_of,
    grey,
    info_with,
    make_columns,
    make_info,
    numbers,
    write_v2,
    write_video,
)
from PIL import Image

from wam_policy.data import video_reader
from wam_policy.data.lerobot_reader import LeRobotDataset
from wam_policy.data.mixture import Mixture
from wam_policy.errors import DatasetError

# -- planes and times of frames --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ([3, 32, 48], ["c", "h", "w"]),
        ([3, 32, 48], None),
        ([3, 32, 48], ["height", "width", "channels"]),
        ([32, 48, 3], ["channels", "height", "width"]),
    ],
)
def test_planes_are_where_the_three_is_whatever_the_names_say(tmp_path, shape, names):
    info = info_with(CAMERA, shape=shape, names=names)
    assert LeRobotDataset(write_v2(tmp_path / "d", info=info)).frame_size(CAMERA) == (32, 48)


def test_planes_of_an_ambiguous_shape_are_told_by_the_video(tmp_path):
    folder = write_v2(tmp_path / "d", info=info_with(CAMERA, shape=[3, 32, 3]))
    assert LeRobotDataset(folder).frame_size(CAMERA) == (32, 32)


@pytest.mark.parametrize("shape", [[32, 32], [32, 32, 1], [4]])
def test_frames_that_are_not_in_colour_are_refused(tmp_path, shape):
    dataset = LeRobotDataset(write_v2(tmp_path / "d", info=info_with(CAMERA, shape=shape)))
    with pytest.raises(DatasetError, match="expected height, width and 3 planes"):
        dataset.frame_size(CAMERA)


def test_rows_that_were_cut_from_the_front_keep_their_pictures(tmp_path):
    columns = make_columns((4,))
    columns["timestamp"] = pa.array([0.3, 0.4, 0.5, 0.6], pa.float32())
    folder = write_v2(tmp_path / "d", (4,), columns=columns, frames_per_row=2)
    assert frames_of(LeRobotDataset(folder)) == [3, 4, 5, 6]


def test_a_video_at_twice_the_rate_shows_every_second_picture(tmp_path):
    folder = write_v2(tmp_path / "d", (6,), frames_per_row=2, video_fps=20)
    assert frames_of(LeRobotDataset(folder)) == [0, 2, 4, 6, 8, 10]


def test_a_video_of_another_rate_is_refused_with_both_times(tmp_path):
    info = make_info("v2.1", (60,), fps=30)
    columns = make_columns((60,))
    columns["timestamp"] = pa.array(np.arange(60) / 30, pa.float32())
    folder = write_v2(
        tmp_path / "d", (60,), info=info, columns=columns, video_fps=Fraction(30000, 1001)
    )
    dataset = LeRobotDataset(folder)
    with pytest.raises(
        DatasetError,
        match=r"timestamp is 1\.6667 s, but the closest frame .* at 1\.6683 s, .* 29\.97 frames",
    ):
        dataset.read_frames(CAMERA, dataset.episodes[0], [50])


def test_timestamps_that_jitter_are_refused_with_both_times(tmp_path):
    columns = make_columns()
    jitter = columns["timestamp"].to_numpy() + np.float32(0.03) * (np.arange(10) == 3)
    columns["timestamp"] = pa.array(jitter, pa.float32())
    dataset = LeRobotDataset(write_v2(tmp_path / "d", columns=columns))
    assert frames_of(dataset, 1) == [0, 1, 2, 3]
    with pytest.raises(DatasetError, match=r"timestamp is 0\.3300 s, .* is at 0\.3000 s"):
        frames_of(dataset)


def test_timestamps_that_go_back_are_refused(tmp_path):
    columns = make_columns()
    columns["timestamp"] = pa.array(columns["timestamp"].to_numpy()[::-1].copy(), pa.float32())
    dataset = LeRobotDataset(write_v2(tmp_path / "d", columns=columns))
    with pytest.raises(DatasetError, match="not in ascending order"):
        frames_of(dataset, 1)


def test_a_stream_that_does_not_begin_at_zero_is_refused_with_its_start(tmp_path):
    folder = write_v2(tmp_path / "d", (6,))
    path = next(folder.glob("videos/**/*.mp4"))
    old = path.rename(tmp_path / "old.mp4")
    with av.open(str(old)) as source, av.open(str(path), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.pts += int(0.1 / packet.time_base)
                packet.dts += int(0.1 / packet.time_base)
                packet.stream = copy
                target.mux(packet)
    with pytest.raises(DatasetError, match=r"begins at 0\.1000 s") as caught:
        frames_of(LeRobotDataset(folder))
    assert "truncated" not in str(caught.value)


def test_a_video_that_is_shorter_than_its_rows_is_not_called_truncated(tmp_path):
    folder = write_v2(tmp_path / "d", (6,))
    write_video(next(folder.glob("videos/**/*.mp4")), 4)
    with pytest.raises(DatasetError, match=r"timestamp is 0\.4000 s, but the last frame") as caught:
        frames_of(LeRobotDataset(folder))
    assert "truncated" not in str(caught.value)


def test_a_forked_process_leaves_the_containers_of_its_parent_alone(tmp_path):
    folder = write_v2(tmp_path / "d")
    dataset = LeRobotDataset(folder)
    assert frames_of(dataset) == [0, 1, 2, 3, 4, 5]  # opens a container in this process
    child = os.fork()
    if child == 0:
        video_reader._containers.cache_clear()
        os._exit(frames_of(dataset, 1) != [0, 1, 2, 3])
    deadline = time.monotonic() + 30
    while not (finished := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    assert finished[1] == 0


def test_a_video_that_a_decoder_calls_corrupt_is_refused(tmp_path, monkeypatch):
    class Corrupt:
        """A frame whose data the decoder had to conceal."""

        def __init__(self, frame):
            self.time = frame.time
            self.key_frame = frame.key_frame
            self.is_corrupt = True

    dataset = LeRobotDataset(write_v2(tmp_path / "d"))
    decode = av.container.InputContainer.decode
    monkeypatch.setattr(
        "wam_policy.data.video_reader._decode",
        lambda container, stream: map(Corrupt, decode(container, stream)),
    )
    with pytest.raises(DatasetError, match=r"episode 0, frames 0 to 5: .* is damaged at 0\.000 s"):
        frames_of(dataset)


# -- pictures in the rows --------------------------------------------------------------------------


def encode(frame, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, kind)
    return buffer.getvalue()


def with_pictures(folder, pictures, **options):
    info = info_with(CAMERA, dtype="image")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": picture, "path": None} for picture in pictures]
    columns = make_columns() | {CAMERA: pa.array(rows, kind)}
    return write_v2(folder, info=info, columns=columns, **options)


def test_pictures_in_the_rows_are_read(tmp_path):
    pictures = [encode(grey(i), "PNG" if i % 2 else "JPEG") for i in range(10)]
    dataset = LeRobotDataset(with_pictures(tmp_path / "d", pictures))
    assert dataset.cameras == [CAMERA]
    assert frames_of(dataset) == [0, 1, 2, 3, 4, 5]
    assert frames_of(dataset, 1) == [6, 7, 8, 9]
    mixture = Mixture([dataset, dataset])
    episode = mixture.episodes[3]
    assert numbers(mixture.read_frames("front", episode, [episode.start + 1])) == [7]


@pytest.mark.parametrize(
    ("picture", "match"),
    [
        (None, "holds no picture"),
        (b"no picture", "cannot be read as PNG or JPEG"),
        (encode(grey(1), "GIF"), "cannot be read as PNG or JPEG"),
        (encode(grey(1))[:60], "cannot be read as PNG or JPEG"),
        (encode(grey(1, 16, 16)), "have several sizes"),
        (encode(np.zeros((4, 4), np.uint16)), "has the mode 'I;16'"),
    ],
)
def test_a_picture_that_cannot_be_used_is_refused_by_episode(tmp_path, picture, match):
    pictures = [encode(grey(i)) for i in range(10)]
    pictures[7] = picture
    dataset = LeRobotDataset(with_pictures(tmp_path / "d", pictures))
    with pytest.raises(DatasetError, match=rf"episode 1, frames 0 to 3: .*{match}"):
        frames_of(dataset, 1)
