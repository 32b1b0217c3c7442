"""A LeRobot dataset that was written is read back equal, and broken ones are refused by place."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from recordings import make_writer
from tiny import LAYOUT

from wam_policy.contract import ActionLayout
from wam_policy.data.lerobot_reader import LeRobotDataset
from wam_policy.data.mixture import Mixture
from wam_policy.data.windows import make_windows, padded_actions
from wam_policy.errors import DatasetError
from wam_policy.evaluation.video import write_mp4

CAMERA = "observation.images.front"
CAMERAS = {CAMERA: (16, 32)}
STATE = ("x", "y")


def make_episode(length, seed=0):
    rng = np.random.default_rng(seed)
    smooth = np.linspace(0, 255, 16 * 32 * 3).reshape(16, 32, 3)
    images = np.stack(
        [np.roll(smooth, int(rng.integers(32)), axis=1) for _ in range(length)]
    ).astype(np.uint8)
    vectors = {
        "observation.state": rng.normal(size=(length, 2)),
        "action": rng.uniform(-1, 1, (length, 3)),
    }
    return {CAMERA: images}, vectors


@pytest.fixture
def folder(tmp_path):
    with make_writer(tmp_path / "data", CAMERAS, state=STATE) as writer:
        for i, (task, length) in enumerate([("touch", 7), ("leave", 4), ("touch", 9)]):
            writer.add_episode(task, *make_episode(length, i))
    return tmp_path / "data"


def test_episodes_come_back_frame_for_frame(folder):
    dataset = LeRobotDataset(folder)
    assert [(e.task, e.stop - e.start) for e in dataset.episodes] == [
        ("touch", 7),
        ("leave", 4),
        ("touch", 9),
    ]
    frames = dataset.read_all_frames(CAMERA)
    state = dataset.vector("observation.state")
    action = dataset.vector("action")
    for i, episode in enumerate(dataset.episodes):
        images, vectors = make_episode(episode.stop - episode.start, i)
        # The conversion from RGB to YUV rounds.
        assert np.abs(frames[episode.start : episode.stop].astype(int) - images[CAMERA]).max() <= 2
        assert np.array_equal(
            state[episode.start : episode.stop], vectors["observation.state"].astype(np.float32)
        )
        assert np.array_equal(
            action[episode.start : episode.stop], vectors["action"].astype(np.float32)
        )
    assert dataset.action_layout() == LAYOUT


def test_the_files_are_lerobot_s_v3_layout(folder):
    info = json.loads((folder / "meta/info.json").read_text())
    assert (
        info["codebase_version"] == "v3.0"
        and info["total_frames"] == 20
        and info["total_tasks"] == 2
    )
    assert info["features"][CAMERA]["dtype"] == "video" and info["features"]["action"][
        "names"
    ] == list(LAYOUT.names)
    tasks = pq.read_table(folder / "meta/tasks.parquet")
    assert tasks.to_pydict() == {"task_index": [0, 1], "__index_level_0__": ["touch", "leave"]}
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["__index_level_0__"]
    data = pq.read_table(folder / "data/chunk-000/file-000.parquet").to_pydict()
    assert data["frame_index"][:8] == [0, 1, 2, 3, 4, 5, 6, 0] and data["index"] == list(range(20))
    assert data["timestamp"][1] == pytest.approx(0.1)
    statistics = json.loads((folder / "meta/stats.json").read_text())
    assert np.shape(statistics[CAMERA]["mean"]) == (3, 1, 1) and statistics["action"]["count"] == [
        20
    ]
    assert set(statistics) == set(info["features"])
    episode = pq.read_table(folder / "meta/episodes/chunk-000/file-000.parquet").to_pylist()[1]
    assert episode["stats/frame_index/max"] == [3] and np.shape(
        episode[f"stats/{CAMERA}/mean"]
    ) == (3, 1, 1)


def test_a_dataset_begun_and_not_finished_leaves_nothing(tmp_path):
    with (
        pytest.raises(RuntimeError, match="crash"),
        make_writer(tmp_path / "data", CAMERAS, state=STATE) as writer,
    ):
        writer.add_episode("touch", *make_episode(3))
        raise RuntimeError("crash")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_never_overwritten(folder):
    with pytest.raises(DatasetError, match="exists"):
        make_writer(folder, CAMERAS, state=STATE)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda images, vectors: vectors.pop("action"), "needs"),
        (lambda images, vectors: vectors.update(action=np.zeros((2, 3))), "of one length"),
        (lambda images, vectors: vectors.update(action=np.full((3, 3), np.nan)), "finite"),
        (
            lambda images, vectors: images.update({CAMERA: np.zeros((3, 16, 16, 3), np.uint8)}),
            "expected uint8",
        ),
    ],
)
def test_bad_episodes_are_refused(tmp_path, change, match):
    images, vectors = make_episode(3)
    change(images, vectors)
    with (
        pytest.raises(DatasetError, match=match),
        make_writer(tmp_path / "data", CAMERAS, state=STATE) as writer,
    ):
        writer.add_episode("touch", images, vectors)


def change_info(folder, **changes):
    path = folder / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_broken_datasets_are_refused(folder, tmp_path):
    with pytest.raises(DatasetError, match=r"no meta/info\.json"):
        LeRobotDataset(tmp_path)
    dataset = LeRobotDataset(folder)
    with pytest.raises(DatasetError, match="no feature 'effort'"):
        dataset.vector("effort")
    with pytest.raises(DatasetError, match="no camera 'top'"):
        dataset.read_all_frames("top")
    (folder / "meta/wam_contract.json").unlink()
    with pytest.raises(DatasetError, match="does not declare what its actions mean"):
        dataset.action_layout()
    next(folder.glob("videos/*/*/*.mp4")).write_bytes(b"no video")
    with pytest.raises(DatasetError, match="cannot decode"):
        dataset.read_all_frames(CAMERA)
    change_info(folder, total_frames=21)
    with pytest.raises(DatasetError, match="states 21 frames, found 20"):
        LeRobotDataset(folder)
    change_info(folder, codebase_version="v1.6")
    with pytest.raises(DatasetError, match=r"knows v2\.0, v2\.1, v3\.0: convert it"):
        LeRobotDataset(folder)


def as_v21(folder, out):
    """The same dataset in the older layout: a file per episode, facts as lines of JSON."""
    dataset = LeRobotDataset(folder)
    info = json.loads((folder / "meta/info.json").read_text())
    info |= {"codebase_version": "v2.1", "chunks_size": 2}
    info["data_path"] = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    info["video_path"] = (
        "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    )
    (out / "meta").mkdir(parents=True)
    rows, frames = (
        pq.read_table(next(folder.glob("data/*/*.parquet"))),
        dataset.read_all_frames(CAMERA),
    )
    tasks = {task: i for i, task in enumerate(dict.fromkeys(dataset.instructions()))}
    lines = []
    for e in dataset.episodes:
        place = {"episode_chunk": e.index // 2, "episode_index": e.index}
        data, video = (
            out / info[f"{kind}_path"].format(video_key=CAMERA, **place)
            for kind in ("data", "video")
        )
        (
            data.parent.mkdir(parents=True, exist_ok=True),
            video.parent.mkdir(parents=True, exist_ok=True),
        )
        pq.write_table(rows.slice(e.start, e.stop - e.start), data)
        write_mp4(video, list(frames[e.start : e.stop]), fps=10)
        lines.append({"episode_index": e.index, "tasks": [e.task], "length": e.stop - e.start})
    info["features"]["observation.state"]["names"] = {"motors": ["x", "y"]}
    (out / "meta/info.json").write_text(json.dumps(info))
    (out / "meta/episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (out / "meta/tasks.jsonl").write_text(
        "".join(json.dumps({"task_index": i, "task": task}) + "\n" for task, i in tasks.items())
    )
    return out


def test_a_vector_of_one_number_is_written_as_plain_numbers(tmp_path):
    layout = ActionLayout(names=("torque",), control="joint_torque", gripper=None)
    writer = make_writer(tmp_path / "data", {CAMERA: (16, 16)}, state=STATE, action=layout)
    action = np.arange(4, dtype=np.float32)[:, None]
    with writer:
        frames = {CAMERA: np.zeros((4, 16, 16, 3), np.uint8)}
        writer.add_episode(
            "swing", frames, {"observation.state": np.repeat(action, 2, axis=1), "action": action}
        )
    schema = pq.read_schema(next(tmp_path.glob("data/data/*/*.parquet")))
    assert schema.field("action").type == pa.float32()
    assert np.array_equal(LeRobotDataset(tmp_path / "data").vector("action"), action)


def test_a_v21_dataset_reads_as_the_same_v30_dataset(folder, tmp_path):
    old, new = LeRobotDataset(as_v21(folder, tmp_path / "old")), LeRobotDataset(folder)
    assert [(e.index, e.task, e.start, e.stop) for e in old.episodes] == [
        (e.index, e.task, e.start, e.stop) for e in new.episodes
    ]
    assert old.names == new.names and old.instructions() == new.instructions()
    for key in new.names:
        assert np.array_equal(old.vector(key), new.vector(key))
    # The frames were encoded once more.
    assert np.abs(old.read_all_frames(CAMERA).astype(int) - new.read_all_frames(CAMERA)).mean() < 3
    assert old.sha256 != new.sha256


def test_pictures_of_some_rows_are_those_of_the_whole(folder):
    dataset = LeRobotDataset(folder)
    frames = dataset.read_all_frames(CAMERA)
    for episode in dataset.episodes:
        for rows in (
            [episode.start],
            [episode.start + 1, episode.stop - 1],
            [episode.stop - 1] * 3,
        ):
            assert np.array_equal(dataset.read_frames(CAMERA, episode, rows), frames[rows])
    with pytest.raises(
        DatasetError, match=r"episode 2, frames 9 to 9: the episode has the frames 0 to 8"
    ):
        dataset.read_frames(CAMERA, dataset.episodes[2], [20])


def rewrite_rows(folder, change):
    """Change the rows of a recording in place, by a function of their columns."""
    (file,) = folder.glob("data/**/*.parquet")
    columns = pq.read_table(file).to_pydict()
    change(columns)
    pq.write_table(pa.table(columns), file)


def test_a_number_that_isn_t_finite_is_named_by_episode_and_frame(folder):
    rewrite_rows(folder, lambda columns: columns["action"][7 + 2].__setitem__(1, float("nan")))
    with pytest.raises(DatasetError, match="action is not finite in episode 1, frame 2"):
        LeRobotDataset(folder).vector("action")


def test_frames_of_an_episode_may_have_sentences_of_their_own(folder):
    rewrite_rows(folder, lambda columns: columns["task_index"].__setitem__(slice(8, 10), [0, 0]))
    assert LeRobotDataset(folder).instructions()[6:12] == [
        "touch",
        "leave",
        "touch",
        "touch",
        "leave",
        "touch",
    ]


def test_rows_of_another_episode_are_refused(folder):
    rewrite_rows(folder, lambda columns: columns["episode_index"].__setitem__(12, 0))
    with pytest.raises(DatasetError, match="rows 11 to 20 are not those of episode 2"):
        LeRobotDataset(folder)


def test_a_truncated_video_is_named_with_its_frames(folder):
    (file,) = folder.glob("videos/**/*.mp4")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    dataset = LeRobotDataset(folder)
    with pytest.raises(DatasetError, match=r"data, episode 2, frames 0 to 8: cannot decode .*mp4"):
        dataset.read_frames(CAMERA, dataset.episodes[2], np.arange(11, 20))


def test_numbers_of_a_feature_are_found_by_name(folder):
    dataset = LeRobotDataset(folder)
    mixture = Mixture([dataset])
    assert np.array_equal(
        mixture.states(("y",))[:, 0],
        dataset.vector("observation.state")[:, 1],
    )
    with pytest.raises(DatasetError, match=r"has no \['z'\]; it has \['x', 'y'\]"):
        mixture.states(("x", "z"))


def test_a_broken_v21_dataset_is_refused_by_file(folder, tmp_path):
    old = as_v21(folder, tmp_path / "old")
    (old / "meta/tasks.jsonl").write_text('{"task_index": 0, "task": "touch"}\n')
    with pytest.raises(DatasetError, match="task 1 has no text"):
        LeRobotDataset(old).instructions()
    (old / "data/chunk-001/episode_000002.parquet").write_bytes(b"no table")
    with pytest.raises(DatasetError, match=r"episode_000002\.parquet cannot be read"):
        LeRobotDataset(old)
    (old / "meta/episodes.jsonl").unlink()
    with pytest.raises(DatasetError, match=r"no meta/episodes\.jsonl"):
        LeRobotDataset(old)


def test_windows_repeat_the_last_row_past_the_end_and_mark_it(folder):
    dataset = LeRobotDataset(folder)
    windows = make_windows(dataset.episodes, horizon=4, frames=3, frame_stride=2, window_stride=2)
    assert windows.start.tolist() == [0, 2, 4, 6, 7, 9, 11, 13, 15, 17, 19]
    i = windows.start.tolist().index(4)
    assert windows.action_rows[i].tolist() == [4, 5, 6, 6] and windows.action_is_pad[
        i
    ].tolist() == [False] * 3 + [True]
    assert windows.frame_rows[i].tolist() == [4, 6, 6] and windows.frame_is_pad[i].tolist() == [
        False,
        False,
        True,
    ]


def test_past_the_end_displacements_are_zero_and_the_gripper_keeps_its_value(folder):
    dataset = LeRobotDataset(folder)
    actions = dataset.vector("action")
    windows = make_windows(dataset.episodes, horizon=3, frames=1, frame_stride=1)
    last = windows.start.tolist().index(6)
    chunk = padded_actions(actions, windows, LAYOUT)[last]
    assert np.array_equal(chunk[0], actions[6])
    assert (chunk[1:, :2] == 0).all() and (chunk[1:, 2] == actions[6, 2]).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must hold a JSON object, got list"),
        ("{}", "is not a contract"),
        ('{"action": {"names": ["x"]}}', "is not a contract"),
    ],
)
def test_a_contract_that_is_no_contract_is_refused_by_its_file(folder, content, message):
    (folder / "meta/wam_contract.json").write_text(content)
    with pytest.raises(DatasetError, match=rf"wam_contract\.json.*{message}"):
        LeRobotDataset(folder).action_layout()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must hold a JSON object, got list"),
        ('{"codebase_version": "v3.0", "fps": 10}', r"missing \['features', 'total_frames'\]"),
    ],
)
def test_an_info_file_that_is_damaged_is_refused(folder, content, message):
    (folder / "meta/info.json").write_text(content)
    with pytest.raises(DatasetError, match=rf"info\.json.*{message}"):
        LeRobotDataset(folder)


def test_a_vector_of_one_number_that_is_stored_as_a_number_is_read(folder):
    (file,) = folder.glob("data/**/*.parquet")
    columns = pq.read_table(file).to_pydict()
    first = [row[0] for row in columns["observation.state"]]
    columns["observation.state"] = pa.array(first, pa.float32())
    pq.write_table(pa.table(columns), file)

    info = json.loads((folder / "meta/info.json").read_text())
    info["features"]["observation.state"] |= {"shape": [1], "names": ["x"]}
    (folder / "meta/info.json").write_text(json.dumps(info))
    state = LeRobotDataset(folder).vector("observation.state")
    assert state.shape == (20, 1)
    assert np.array_equal(state[:, 0], np.float32(first))


def test_a_dataset_without_episodes_leaves_nothing(tmp_path):
    with pytest.raises(DatasetError), make_writer(tmp_path / "data", CAMERAS, state=STATE):
        pass
    assert list(tmp_path.iterdir()) == []
