"""Documents of other people are read bounded, as UTF-8, or refused by file and cure."""

import json

import pytest

from wam_policy.errors import CheckpointError
from wam_policy.utils import documents

CURE = "download it again"


def read(function, tmp_path, content: bytes):
    path = tmp_path / "document"
    path.write_bytes(content)
    return function(path, CheckpointError, CURE)


@pytest.mark.parametrize("content", [b'{"a": 1}', b'\xef\xbb\xbf{"a": 1}', b' {"a":\r\n1}\n'])
def test_json_is_read_with_and_without_a_byte_order_mark(tmp_path, content):
    assert read(documents.read_json_object, tmp_path, content) == {"a": 1}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[1]", "must hold a JSON object, got list"),
        (b"null", "must hold a JSON object, got NoneType"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a": "\xe9"}', "is not a text file in UTF-8"),
        (b"\xff\xfe{\x00}\x00", "is not a text file in UTF-8"),
    ],
)
def test_what_is_not_json_is_refused_with_the_cure(tmp_path, content, match):
    with pytest.raises(CheckpointError, match=rf"document.* {match}.*; {CURE}"):
        read(documents.read_json_object, tmp_path, content)


def test_a_document_beyond_the_bound_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_BYTES", 2**20)
    with pytest.raises(CheckpointError, match="larger than 1 MiB"):
        read(documents.read_json, tmp_path, b" " * (2**20 + 1))
    lines = read(documents.read_json_lines, tmp_path, b"{}\n" + b" " * (2**20 + 1))
    with pytest.raises(CheckpointError, match="line 2 is longer than 1 MiB"):
        list(lines)


def test_lines_end_at_line_feeds_only_and_name_their_place(tmp_path):
    rows = [{"a": "one\u2028two\x85"}, {"b": 2}]
    text = "\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    read_rows = list(read(documents.read_json_lines, tmp_path, text.encode()))
    assert [row for _, row in read_rows] == rows
    assert read_rows[1][0].endswith("document, line 3")
    path = tmp_path / "document"
    complete = documents.read_json_lines(path, CheckpointError, CURE, only_complete=True)
    assert [row for _, row in complete] == rows[:1]


def test_a_file_that_is_missing_or_a_folder_is_refused(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read"):
            documents.read_json(path, CheckpointError, CURE)
        with pytest.raises(CheckpointError, match="cannot be read"):
            list(documents.read_json_lines(path, CheckpointError, CURE))


def test_yaml_is_plain_data(tmp_path):
    assert read(documents.read_yaml, tmp_path, b"a: [1, {b: c}]\nd: &x [2]\ne: *x\n") == {
        "a": [1, {"b": "c"}],
        "d": [2],
        "e": [2],
    }
    assert read(documents.read_yaml, tmp_path, b"") is None


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"a: !!python/object:list []", "is not plain data"),
        (b"a: [", "is not plain data"),
        (b"a: \x1a", "is not plain data"),
        (b"a: &x [*x]", "is not plain data"),
        (b"[" * 20_000, "is not plain data"),
    ],
)
def test_yaml_that_is_more_than_data_is_refused(tmp_path, content, match):
    with pytest.raises(CheckpointError, match=match):
        read(documents.read_yaml, tmp_path, content)


def test_aliases_that_multiply_are_refused_in_no_time(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    with pytest.raises(CheckpointError, match="holds more than"):
        read(documents.read_yaml, tmp_path, "\n".join(lines).encode())
