"""Folders and files are replaced whole, whatever happens meanwhile."""

import json
import threading

import pytest

from wam_policy.errors import CheckpointError, DatasetError
from wam_policy.utils import io

MARKER = "config.json"


def save(folder, version, names=("config.json", "model.bin", "part/data.bin")):
    with io.replace_files(folder, MARKER, ("*.bin", "part/*.bin")) as stage:
        for name in names:
            (stage / name).parent.mkdir(exist_ok=True)
            (stage / name).write_text(version)


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def test_files_are_replaced_stale_ones_go_and_others_stay(tmp_path):
    folder = tmp_path / "new"
    save(folder, "one")
    (folder / "notes.txt").write_text("mine")
    save(folder, "two", ("config.json", "model.bin"))
    assert contents(folder) == {"config.json": "two", "model.bin": "two", "notes.txt": "mine"}


def test_an_error_leaves_what_was_there(tmp_path):
    save(tmp_path, "one")
    before = contents(tmp_path)
    with pytest.raises(RuntimeError), io.replace_files(tmp_path, MARKER) as stage:
        (stage / MARKER).write_text("two")
        raise RuntimeError
    assert contents(tmp_path) == before
    with pytest.raises(RuntimeError), io.replace_files(tmp_path / "new", MARKER):
        raise RuntimeError
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("moved", range(4))
def test_an_interrupted_replacement_is_completed_by_the_next_reader(tmp_path, monkeypatch, moved):
    save(tmp_path, "one")
    moves = []
    replace = type(tmp_path).replace

    def stop(path, target):
        """The process ends before so many moves."""
        if len(moves) == moved:
            raise KeyboardInterrupt
        moves.append(path)
        return replace(path, target)

    monkeypatch.setattr(type(tmp_path), "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, "two")
        raise KeyboardInterrupt  # all of them were done
    monkeypatch.undo()
    read = io.read_consistently(tmp_path, MARKER, lambda: contents(tmp_path))
    assert read == dict.fromkeys(("config.json", "model.bin", "part/data.bin"), "two")


@pytest.mark.parametrize(
    "moves",
    [
        {"files": ["../outside"], "stale": [], "marker": MARKER},
        {"files": [], "stale": ["../victim"], "marker": MARKER},
        {"files": [], "stale": ["link/victim"], "marker": MARKER},
        {"files": 3, "stale": [], "marker": MARKER},
        [],
    ],
)
def test_a_list_of_moves_that_leads_elsewhere_is_refused(tmp_path, moves):
    folder = tmp_path / "folder"
    committed = folder / io.COMMITTED
    committed.mkdir(parents=True)
    (tmp_path / "victim").write_text("mine")
    (folder / "link").symlink_to(tmp_path)
    (folder / "outside").write_text("theirs")
    (committed / io._MOVES).write_text(json.dumps(moves))
    with pytest.raises(CheckpointError, match="interrupted save"):
        io.recover(folder)
    assert (tmp_path / "victim").read_text() == "mine"
    assert not (tmp_path / "outside").exists()


def test_a_reader_begins_again_if_the_folder_is_replaced_meanwhile(tmp_path):
    save(tmp_path, "one")
    seen = []

    def read():
        """The first and the second time another process saves between two files."""
        first = (tmp_path / MARKER).read_text()
        if len(seen) < 2:
            save(tmp_path, f"version {len(seen)}")
        seen.append(first)
        return first, (tmp_path / "model.bin").read_text()

    assert io.read_consistently(tmp_path, MARKER, read) == ("version 1", "version 1")
    assert len(seen) == 3


def test_a_lock_is_held_by_one_process_and_leaves_no_file(tmp_path):
    with (
        io.locked(tmp_path),
        pytest.raises(CheckpointError, match="in use by a live run"),
        io.locked(tmp_path),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_many_writers_of_one_file_leave_one_of_their_contents(tmp_path):
    path = tmp_path / "file"
    texts = [str(i) * 10_000 for i in range(8)]
    threads = [threading.Thread(target=io.write_text, args=(path, text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_place_that_cannot_be_written_is_an_error_of_the_package(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write .*what was there before is unchanged"):
        save(tmp_path / "file" / "folder", "one")
    with pytest.raises(CheckpointError, match="cannot write"):
        io.write_text(tmp_path / "nowhere" / "file", "")
    with pytest.raises(DatasetError), io.explained_write_errors(tmp_path, DatasetError):
        (tmp_path / "nowhere").rename(tmp_path / "else")
