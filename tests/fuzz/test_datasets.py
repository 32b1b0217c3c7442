"""Damaged datasets are refused by file, or read as before."""

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from foreign_datasets import CAMERA, STATE, write_v2, write_v3
from fuzz_harness import Campaign, Outcome
from fuzz_mutations import VALUES, damage_json, damaged_copies
from recordings import make_writer

from wam_policy.contract import ActionLayout
from wam_policy.data.lerobot_reader import LeRobotDataset

CASES = 2100
KINDS = ("v2", "v3", "ours")


def write_ours(folder: Path) -> Path:
    """A dataset of this package's writer, whose tables have checksums."""
    layout = ActionLayout(names=("a0", "a1", "a2"), control="joint_position", gripper=None)
    writer = make_writer(folder, {CAMERA: (32, 32)}, state=("s0", "s1"), action=layout)
    rng = np.random.default_rng(0)
    with writer:
        for task, length in (("lift it", 6), ("drop it", 4)):
            frames = rng.integers(0, 255, (length, 32, 32, 3), np.uint8)
            vectors = {STATE: rng.normal(size=(length, 2)), "action": rng.normal(size=(length, 3))}
            writer.add_episode(task, {CAMERA: frames}, vectors)
    return folder


WRITERS = {"v2": write_v2, "v3": write_v3, "ours": write_ours}


def damage_table(path: Path, rng: random.Random) -> tuple[str, bool]:
    """Replace a value of a table, cast a column, or remove one; nothing tells some of them."""
    table = pq.read_table(path)
    name = rng.choice(table.column_names)
    column = table[name].to_pylist()
    kind = rng.choice(("value", "null", "text", "drop", "rows"))
    if kind == "value":
        column[rng.randrange(len(column))] = rng.choice(VALUES)
    elif kind == "null":
        column[rng.randrange(len(column))] = None
    elif kind == "text":
        column = list(map(str, column))
    if kind == "drop":
        table = table.drop_columns([name])
    elif kind == "rows":
        table = table.slice(rng.randrange(len(column)))
    else:
        try:
            replaced = pa.array(column)
        except (pa.ArrowException, OverflowError, TypeError, ValueError):
            # Arrow does not write such a column.
            replaced = pa.array([repr(value) for value in column])
        table = table.set_column(table.column_names.index(name), name, replaced)
    pq.write_table(table, path)
    return f"{kind} {name} of {path.name}", True


ENTRIES = {".json": damage_json, ".parquet": damage_table}


def content(folder: Path) -> dict:
    """Everything that training reads of a dataset."""
    dataset = LeRobotDataset(folder)
    layout = dataset.action_layout()
    return {
        "names": dataset.names,
        "fps": dataset.fps,
        "layout": layout,
        "instructions": dataset.instructions(),
        "state": dataset.vector(STATE),
        "action": dataset.vector("action"),
        "frames": dataset.read_all_frames(CAMERA),
        "size": dataset.frame_size(CAMERA),
    }


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_no_damaged_dataset_raises_anything_else(tmp_path, kind):
    torch.set_num_threads(1)
    campaign = Campaign(f"datasets, {kind}", str(tmp_path / "log"))
    base = WRITERS[kind](tmp_path / "base")
    folder = tmp_path / "damaged"
    expected = content(base)
    copies = damaged_copies(base, folder, CASES // len(KINDS), random.Random(kind), ENTRIES)

    for i, (path, damage) in enumerate(copies):
        # Pictures, tables without checksums and entries that are optional may change unseen.
        is_covered = kind == "ours" and path.suffix == ".parquet" and damage.kind != "entry"

        def judge(may_differ=not is_covered) -> Outcome:
            """Read the damaged dataset whole."""
            read = content(folder)
            if all(np.array_equal(read[key], expected[key]) for key in ("state", "action")):
                others = [key for key in expected if key not in ("state", "action", "frames")]
                same_frames = np.array_equal(read["frames"], expected["frames"])
                if same_frames and all(read[key] == expected[key] for key in others):
                    return Outcome.EQUAL
            return Outcome.PLAUSIBLE if may_differ else Outcome.SILENT

        campaign.run(f"{i}: {damage.what}", judge)
    campaign.report()
