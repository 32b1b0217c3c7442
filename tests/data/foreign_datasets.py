"""LeRobot datasets as other people's converters write them, by pyarrow and PyAV alone."""

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CAMERA = "observation.images.front"
STATE = "observation.state"
LENGTHS = (6, 4)  # rows of the two episodes
FPS = 10
CONTRACT = {
    "action": {
        "names": ["a0", "a1", "a2"],
        "control": "end_effector_delta",
        "gripper": {"index": 2, "open": 1.0, "closed": -1.0},
    }
}


def grey(number, height=32, width=32):
    """A picture that shows its number, modulo 40."""
    return np.full((height, width, 3), 6 * (number % 40) + 6, np.uint8)


def numbers(frames):
    """The numbers that pictures show."""
    return [round((float(frame.mean()) - 6) / 6) for frame in frames]


def write_video(path: Path, count: int, fps=FPS, height=32, width=32) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        options = {"crf": "0", "preset": "ultrafast"}
        stream = container.add_stream("libx264", rate=Fraction(fps), options=options)
        stream.width = width
        stream.height = height
        stream.pix_fmt = "yuv420p"
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(grey(number, height, width), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def make_columns(lengths=LENGTHS):
    """The columns of all rows, by feature."""
    rng = np.random.default_rng(0)
    count = sum(lengths)
    frame = np.concatenate([np.arange(length) for length in lengths])
    vector = pa.list_(pa.float32())
    state = rng.normal(size=(count, 2)).astype(np.float32)
    action = rng.uniform(-1, 1, (count, 3)).astype(np.float32)
    return {
        STATE: pa.array(state.tolist(), vector),
        "action": pa.array(action.tolist(), vector),
        "timestamp": pa.array(frame / FPS, pa.float32()),
        "frame_index": pa.array(frame),
        "episode_index": pa.array(np.repeat(np.arange(len(lengths)), lengths)),
        "index": pa.array(np.arange(count)),
        "task_index": pa.array(np.zeros(count, int)),
    }


def make_info(version, lengths=LENGTHS, fps=FPS):
    """The content of `meta/info.json`."""
    features = {
        STATE: {"dtype": "float32", "shape": [2], "names": ["s0", "s1"]},
        "action": {"dtype": "float32", "shape": [3], "names": ["a0", "a1", "a2"]},
        CAMERA: {"dtype": "video", "shape": [32, 32, 3], "names": ["height", "width", "channels"]},
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    }
    for key in ("frame_index", "episode_index", "index", "task_index"):
        features[key] = {"dtype": "int64", "shape": [1], "names": None}
    data = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    video = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    if version != "v3.0":
        data = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
        video = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    return {
        "codebase_version": version,
        "robot_type": "toy",
        "total_episodes": len(lengths),
        "total_frames": sum(lengths),
        "chunks_size": 1000,
        "fps": fps,
        "data_path": data,
        "video_path": video,
        "features": features,
    }


def info_with(key, **changes):
    """The content of `meta/info.json` with changes to a feature."""
    info = make_info("v2.1")
    info["features"][key] |= changes
    return info


def write_json_lines(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_v2(
    folder: Path,
    lengths=LENGTHS,
    *,
    info=None,
    columns=None,
    version="v2.1",
    video_fps=FPS,
    frames_per_row=1,
) -> Path:
    """A dataset of version 2: a file and a video per episode."""
    info = info or make_info(version, lengths)
    table = pa.table(columns or make_columns(lengths))
    (folder / "meta").mkdir(parents=True)
    episodes = []
    start = 0
    for index, length in enumerate(lengths):
        fields = {"episode_chunk": 0, "episode_index": index, "video_key": CAMERA}
        path = folder / info["data_path"].format(**fields)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.slice(start, length), path)
        if info["features"].get(CAMERA, {}).get("dtype") == "video":
            video = folder / info["video_path"].format(**fields)
            write_video(video, length * frames_per_row, video_fps)
        episodes.append({"episode_index": index, "tasks": ["lift it"], "length": length})
        start += length
    (folder / "meta/info.json").write_text(json.dumps(info), encoding="utf-8")
    write_json_lines(folder / "meta/episodes.jsonl", episodes)
    write_json_lines(folder / "meta/tasks.jsonl", [{"task_index": 0, "task": "lift it"}])
    (folder / "meta/wam_contract.json").write_text(json.dumps(CONTRACT), encoding="utf-8")
    return folder


def write_v3(folder: Path, lengths=LENGTHS, *, info=None, episodes=None, tasks=None) -> Path:
    """A dataset of version 3: one file of rows for each episode, and one video for both.

    `episodes` are entries that replace those of every episode.
    """
    for name in ("meta/episodes/chunk-000", "data/chunk-000"):
        (folder / name).mkdir(parents=True)
    table = pa.table(make_columns(lengths))
    starts = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    rows = []
    for index, length in enumerate(lengths):
        part = table.slice(starts[index], length)
        pq.write_table(part, folder / f"data/chunk-000/file-{index:03d}.parquet")
        row = {
            "episode_index": index,
            "tasks": ["lift it"],
            "length": length,
            "dataset_from_index": starts[index],
            "dataset_to_index": starts[index + 1],
            f"videos/{CAMERA}/chunk_index": 0,
            f"videos/{CAMERA}/file_index": 0,
            f"videos/{CAMERA}/from_timestamp": starts[index] / FPS,
        }
        rows.append(row | (episodes or {}))
    write_video(folder / f"videos/{CAMERA}/chunk-000/file-000.mp4", sum(lengths))
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, folder / "meta/episodes/chunk-000/file-000.parquet")
    tasks = tasks or {"task_index": [0], "__index_level_0__": ["lift it"]}
    pq.write_table(pa.table(tasks), folder / "meta/tasks.parquet")
    info = info or make_info("v3.0", lengths)
    (folder / "meta/info.json").write_text(json.dumps(info), encoding="utf-8")
    (folder / "meta/wam_contract.json").write_text(json.dumps(CONTRACT), encoding="utf-8")
    return folder


def frames_of(dataset, index=0):
    """The numbers that the pictures of an episode show."""
    episode = dataset.episodes[index]
    return numbers(dataset.read_frames(CAMERA, episode, np.arange(episode.start, episode.stop)))


def change_table(path: Path, name: str, column) -> None:
    """Replace a column of a parquet file."""
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.schema.get_field_index(name), name, column), path)
