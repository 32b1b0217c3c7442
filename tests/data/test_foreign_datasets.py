"""Datasets of other people's converters are read right, or refused by file and entry."""

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from foreign_datasets import (
    CAMERA,
    STATE,
    change_table,
    frames_of,
    info_with,
    make_columns,
    make_info,
    write_json_lines,
    write_v2,
    write_v3,
)

from wam_policy.data.lerobot_reader import LeRobotDataset
from wam_policy.data.mixture import Mixture
from wam_policy.errors import DatasetError

# -- names and types of numbers --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a", "b", "c"], ("a", "b", "c")),
        ([["a", "b", "c"]], ("a", "b", "c")),
        ([["a"], ["b", "c"]], ("a", "b", "c")),
        ({"motors": ["a", "b", "c"]}, ("a", "b", "c")),
        ({"a": 2, "b": 0, "c": 1}, ("b", "c", "a")),
        ({"arm": ["x", "y"], "hand": "g"}, ("x", "y", "g")),
        ({"left": ["x", "y"], "right": ["x"]}, ("left.x", "left.y", "right.x")),
        (["action"], ("action_0", "action_1", "action_2")),
        ("action", ("action_0", "action_1", "action_2")),
        (None, ("action_0", "action_1", "action_2")),
        (["a", "a", "a"], ("action_0", "action_1", "action_2")),
    ],
)
def test_names_of_numbers_may_be_declared_in_any_of_the_usual_forms(tmp_path, names, expected):
    info = info_with("action", names=names)
    assert LeRobotDataset(write_v2(tmp_path / "d", info=info)).names["action"] == expected


def test_one_name_for_one_number_is_its_name(tmp_path):
    info = info_with("action", names="g", shape=[1])
    assert LeRobotDataset(write_v2(tmp_path / "d", info=info)).names["action"] == ("g",)


def test_names_that_are_too_few_are_refused_with_both_counts(tmp_path):
    folder = write_v2(tmp_path / "d", info=info_with("action", names=["a", "b"]))
    with pytest.raises(DatasetError, match=r"'action' has 3 numbers .* but 2 names \(a, b\)"):
        LeRobotDataset(folder)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("int64", pa.int64()),
        ("uint8", pa.uint8()),
        ("float16", pa.float16()),
        ("float64", pa.float64()),
    ],
)
@pytest.mark.parametrize("container", ["list", "large list", "fixed list"])
def test_numbers_of_any_type_are_cast(tmp_path, name, kind, container):
    forms = {
        "list": pa.list_(kind),
        "large list": pa.large_list(kind),
        "fixed list": pa.list_(kind, 3),
    }
    columns = make_columns()
    columns["action"] = pa.array([[0, 1, 0]] * 10, forms[container])
    folder = write_v2(tmp_path / "d", info=info_with("action", dtype=name), columns=columns)
    values = LeRobotDataset(folder).vector("action")
    assert values.dtype == np.float32
    assert np.array_equal(values, [[0, 1, 0]] * 10)


@pytest.mark.parametrize(
    ("column", "match"),
    [
        (pa.array([["0", "1", "0"]] * 10), "action holds string, which are not numbers"),
        (pa.array([[2**30 + 1, 0, 0]] * 10), "action holds integers .* float32 cannot hold"),
        (pa.array([0.5] * 10), "action holds double, expected lists of 3 numbers"),
        (pa.array([{"a": 1}] * 10), "not lists of numbers"),
        (pa.array([[1e300, 0, 0]] * 10), "action is not finite in episode 0, frame 0"),
    ],
)
def test_numbers_that_float32_cannot_hold_are_refused_by_their_type(tmp_path, column, match):
    folder = write_v2(tmp_path / "d", columns=make_columns() | {"action": column})
    with pytest.raises(DatasetError, match=match):
        LeRobotDataset(folder).vector("action")


def test_a_feature_that_is_no_vector_is_refused_by_its_type(tmp_path):
    info = make_info("v2.1")
    info["features"]["note"] = {"dtype": "string", "shape": [1], "names": None}
    dataset = LeRobotDataset(write_v2(tmp_path / "d", info=info))
    with pytest.raises(DatasetError, match=r"no vector \(its dtype is 'string'\) 'note'"):
        dataset.vector("note")


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (None, "action is empty in episode 1, frame 1"),
        ([1.0, 2.0], "action has 2 numbers, expected 3 in episode 1, frame 1"),
        ([1.0, 2.0, 3.0, 4.0], "action has 4 numbers, expected 3 in episode 1, frame 1"),
        ([1.0, None, 3.0], "action lacks its number 1 in episode 1, frame 1"),
        ([1.0, float("inf"), 3.0], "action is not finite in episode 1, frame 1"),
    ],
)
def test_a_row_that_is_empty_or_ragged_is_named_by_episode_and_frame(tmp_path, value, match):
    columns = make_columns()
    rows = columns["action"].to_pylist()
    rows[7] = value
    columns["action"] = pa.array(rows, pa.list_(pa.float32()))
    with pytest.raises(DatasetError, match=match):
        LeRobotDataset(write_v2(tmp_path / "d", columns=columns)).vector("action")


def test_a_vector_of_one_number_is_read_from_a_plain_column(tmp_path):
    columns = make_columns()
    columns["action"] = pa.array([0.1 * i for i in range(10)], pa.float32())
    info = info_with("action", shape=[1], names=["g"])
    values = LeRobotDataset(write_v2(tmp_path / "d", info=info, columns=columns)).vector("action")
    assert np.allclose(values, np.arange(10)[:, None] / 10)


@pytest.mark.parametrize(
    ("name", "kind"), [("action", pa.list_(pa.float64())), ("task_index", pa.int32())]
)
def test_files_of_other_arrow_types_are_cast_to_what_is_declared(tmp_path, name, kind):
    folder = write_v3(tmp_path / "d")
    expected = LeRobotDataset(folder).vector("action")
    second = folder / "data/chunk-000/file-001.parquet"
    change_table(second, name, pq.read_table(second)[name].cast(kind))
    dataset = LeRobotDataset(folder)
    assert np.array_equal(dataset.vector("action"), expected)
    assert dataset.instructions() == ["lift it"] * 10


def test_a_file_without_a_declared_column_is_named(tmp_path):
    folder = write_v3(tmp_path / "d")
    second = folder / "data/chunk-000/file-001.parquet"
    pq.write_table(pq.read_table(second).drop_columns(["action"]), second)
    with pytest.raises(DatasetError, match=r"file-001\.parquet has no column action"):
        LeRobotDataset(folder)


# -- meta/ -----------------------------------------------------------------------------------------


def test_version_2_0_is_read(tmp_path):
    assert LeRobotDataset(write_v2(tmp_path / "d", version="v2.0")).length == 10


GOOD_TASK = json.dumps({"task_index": 0, "task": "lift it"})


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + GOOD_TASK + "\n",
        GOOD_TASK + "\r\n  \n",
        "\n" + GOOD_TASK,
        GOOD_TASK.replace("0", "0.0", 1),
    ],
)
def test_tasks_with_a_byte_order_mark_or_blank_lines_are_read(tmp_path, text):
    folder = write_v2(tmp_path / "d")
    (folder / "meta/tasks.jsonl").write_bytes(text.encode())
    assert LeRobotDataset(folder).instructions() == ["lift it"] * 10


def test_line_separators_inside_a_sentence_end_no_line(tmp_path):
    folder = write_v2(tmp_path / "d")
    sentence = "lift\u2028the\x85cube\x0b!"
    text = json.dumps({"task_index": 0, "task": sentence}, ensure_ascii=False)
    (folder / "meta/tasks.jsonl").write_text(text + "\n", encoding="utf-8", newline="\n")
    assert LeRobotDataset(folder).instructions()[0] == sentence


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (GOOD_TASK.replace('"lift it"', "null"), "line 1: `task` must be a sentence, got None"),
        (GOOD_TASK.replace('"lift it"', '["lift it"]'), "must be a sentence, got"),
        (GOOD_TASK.replace("0", "0.5", 1), "`task_index` must be an integer from 0 on, got 0.5"),
        (GOOD_TASK.replace("0", "true", 1), "`task_index` must be an integer"),
        (GOOD_TASK + "\n" + GOOD_TASK.replace("lift", "drop"), "it is also 'lift it'"),
        (GOOD_TASK + "\n[]", "line 2 must hold a JSON object, got list"),
        (GOOD_TASK[:-5], "line 1 is not JSON"),
        ("[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_tasks_of_another_form_are_refused_by_line(tmp_path, text, match):
    folder = write_v2(tmp_path / "d")
    (folder / "meta/tasks.jsonl").write_text(text + "\n", encoding="utf-8")
    with pytest.raises(DatasetError, match=rf"tasks\.jsonl, .*{match}"):
        LeRobotDataset(folder)


def test_text_that_is_not_utf_8_is_refused(tmp_path):
    folder = write_v2(tmp_path / "d")
    (folder / "meta/tasks.jsonl").write_bytes(GOOD_TASK.replace("it", "\xe9").encode("latin-1"))
    with pytest.raises(DatasetError, match=r"line 1 is not a text file in UTF-8"):
        LeRobotDataset(folder)


@pytest.mark.parametrize("tasks", [[], "lift it", ["lift it", "another"]])
def test_the_sentence_of_an_episode_is_that_of_its_rows(tmp_path, tasks):
    folder = write_v2(tmp_path / "d")
    rows = [
        {"episode_index": index, "tasks": tasks, "length": length}
        for index, length in enumerate((6, 4))
    ]
    write_json_lines(folder / "meta/episodes.jsonl", rows)
    dataset = LeRobotDataset(folder)
    assert [episode.task for episode in dataset.episodes] == ["lift it"] * 2
    assert LeRobotDataset(write_v3(tmp_path / "v3")).episodes[1].task == "lift it"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"fps": None}, "'fps': expected float, got None"),
        ({"fps": 0}, "`fps` must be positive, got 0"),
        ({"fps": "10"}, "'fps': expected float, got '10'"),
        ({"total_frames": 10.5}, "'total_frames': expected int"),
        ({"total_frames": 10**30}, "the number is too large"),
        ({"total_episodes": 3}, "states 3 episodes, found 2"),
        ({"chunks_size": None}, "lacks `chunks_size`"),
        ({"chunks_size": 0}, "`chunks_size` must be positive"),
        ({"data_path": None}, "lacks `data_path`"),
        ({"video_path": None}, "lacks `video_path`"),
        ({"features": []}, "'features': expected dict"),
        ({"features": {"action": 3}}, "'features.action': expected an object"),
        ({"features": {"action": {"shape": [3]}}}, r"'features.action': missing \['dtype'\]"),
        ({"features": {"action": {"dtype": "float32", "shape": None}}}, "'features.action.shape'"),
        ({"features": {"action": {"dtype": "float32", "shape": [-3]}}}, "must be from 1 to 65536"),
        ({"features": {"action": {"dtype": "float32", "shape": [10**9]}}}, "must be from 1 to"),
        ({"features": {"action": {"dtype": "float32", "shape": [1] * 99}}}, "must be from 1 to"),
    ],
)
def test_an_entry_of_the_info_file_that_is_wrong_is_named(tmp_path, changes, match):
    folder = write_v2(tmp_path / "d")
    (folder / "meta/info.json").write_text(json.dumps(make_info("v2.1") | changes))
    with pytest.raises(DatasetError, match=match):
        LeRobotDataset(folder)


@pytest.mark.parametrize(
    "pattern",
    [
        "../../elsewhere/{episode_index}.parquet",
        "/etc/{episode_index}.parquet",
        "data/{episode_index.__class__}.parquet",
        "data/{secret}.parquet",
        "data/{episode_index:>10}.parquet",
        "data\\{episode_index}.parquet",
    ],
)
def test_a_path_pattern_has_lerobot_s_fields_only_and_stays_inside(tmp_path, pattern):
    folder = write_v2(tmp_path / "d")
    (folder / "meta/info.json").write_text(json.dumps(make_info("v2.1") | {"data_path": pattern}))
    with pytest.raises(DatasetError, match=r"`data_path` is .* write LeRobot's pattern"):
        LeRobotDataset(folder)


def test_file_numbers_of_version_3_may_be_floats_but_not_empty(tmp_path):
    name = f"videos/{CAMERA}/file_index"
    dataset = LeRobotDataset(write_v3(tmp_path / "floats", episodes={name: 0.0}))
    assert frames_of(dataset, 1) == [6, 7, 8, 9]
    for value, match in ((None, "of episode 0 is empty"), (0.5, "must hold integers")):
        folder = write_v3(tmp_path / str(value), episodes={name: value})
        with pytest.raises(DatasetError, match=rf"`{name}` {match}"):
            LeRobotDataset(folder)


def test_files_of_version_3_are_read_in_the_order_of_their_numbers(tmp_path):
    folder = write_v3(tmp_path / "d")
    expected = LeRobotDataset(folder).vector("action")
    (folder / "data/chunk-000/file-000.parquet").rename(folder / "data/chunk-000/file-999.parquet")
    (folder / "data/chunk-000/file-001.parquet").rename(folder / "data/chunk-000/file-1000.parquet")
    assert np.array_equal(LeRobotDataset(folder).vector("action"), expected)


@pytest.mark.parametrize(
    "tasks",
    [
        {"task_index": [0], "task": ["lift it"]},
        {"category": ["kitchen"], "task_index": [0], "task": ["lift it"]},
        {"task_index": [0], "__index_level_0__": ["lift it"]},
    ],
)
def test_sentences_of_version_3_are_the_index_or_the_column_task(tmp_path, tasks):
    assert set(LeRobotDataset(write_v3(tmp_path / "d", tasks=tasks)).instructions()) == {"lift it"}


def test_sentences_of_version_3_in_another_column_are_refused(tmp_path):
    folder = write_v3(tmp_path / "d", tasks={"category": ["kitchen"], "task_index": [0]})
    with pytest.raises(DatasetError, match="neither an index nor a column `task`"):
        LeRobotDataset(folder)


def test_meta_is_read_as_utf_8_in_any_locale(tmp_path):
    folder = write_v2(tmp_path / "d")
    text = json.dumps({"task_index": 0, "task": "pose le café"}, ensure_ascii=False)
    (folder / "meta/tasks.jsonl").write_text(text + "\n", encoding="utf-8")
    code = (
        f"from wam_policy.data.lerobot_reader import LeRobotDataset\n"
        f"print(ascii(LeRobotDataset({str(folder)!r}).instructions()[0]))"
    )
    locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    process = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | locale, capture_output=True, text=True
    )
    assert process.stdout.strip() == ascii("pose le café"), process.stderr


# -- fingerprints ----------------------------------------------------------------------------------


def test_the_fingerprint_covers_content_behind_links_and_in_videos(tmp_path):
    fingerprints = []
    for name, lengths in (("a", (6, 4)), ("b", (5, 5))):
        real = write_v2(tmp_path / f"disk_{name}", lengths)
        link = tmp_path / name
        link.mkdir()
        for part in ("meta", "data", "videos"):
            (link / part).symlink_to(real / part)
        fingerprints.append(LeRobotDataset(link).sha256)
        assert LeRobotDataset(real).sha256 == fingerprints[-1]
    assert fingerprints[0] != fingerprints[1]

    video = next((tmp_path / "disk_a").glob("videos/**/*.mp4"))
    content = bytearray(video.read_bytes())
    content[-1] ^= 1
    video.write_bytes(content)
    assert LeRobotDataset(tmp_path / "a").sha256 != fingerprints[0]


def test_a_dataset_of_which_nothing_can_be_hashed_has_no_fingerprint(tmp_path):
    folder = write_v2(tmp_path / "d")
    dataset = LeRobotDataset(folder)
    folder.rename(tmp_path / "moved")
    with pytest.raises(DatasetError, match="holds no file"):
        _ = dataset.sha256


def test_a_link_to_a_folder_above_it_is_refused(tmp_path):
    folder = write_v2(tmp_path / "d")
    (folder / "videos/loop").symlink_to(folder / "videos")
    with pytest.raises(DatasetError, match="a folder in which it lies"):
        _ = LeRobotDataset(folder).sha256


# -- features of other names -----------------------------------------------------------------------


def test_state_and_actions_may_be_several_features_in_a_given_order(tmp_path):
    info = make_info("v2.1")
    columns = make_columns()
    for side in ("left", "right"):
        key = f"actions.{side}"
        info["features"][key] = {"dtype": "float32", "shape": [2], "names": ["x", "y"]}
        columns[key] = columns[STATE]
    folder = write_v2(tmp_path / "d", info=info, columns=columns)
    with pytest.raises(DatasetError, match=r"no vector 'arm'; it has .* with --action-key"):
        _ = Mixture([folder], action_key=["arm"]).action_names

    mixture = Mixture([folder], state_key=["action"], action_key=["actions.right", "actions.left"])
    assert mixture.state_names == ("a0", "a1", "a2")
    assert mixture.action_names == (
        "actions.right.x",
        "actions.right.y",
        "actions.left.x",
        "actions.left.y",
    )
    reordered = mixture.states(("a2", "a0"))
    assert np.array_equal(reordered, mixture.states()[:, [2, 0]])
    assert mixture.fingerprint() != Mixture([folder]).fingerprint()


def test_a_mixture_compares_only_the_features_that_are_read(tmp_path):
    info = make_info("v2.1")
    info["features"]["observation.effort"] = {"dtype": "float32", "shape": [2], "names": None}
    columns = make_columns()
    columns["observation.effort"] = columns[STATE]
    plain = write_v2(tmp_path / "a")
    more = write_v2(tmp_path / "b", info=info, columns=columns)
    assert Mixture([plain, more]).length == 20
    with pytest.raises(DatasetError, match=r"numbers .* in 'observation.effort'"):
        Mixture([plain, more], state_key=["observation.effort"])
