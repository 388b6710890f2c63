"""Rows of data files: every file type, each row with its line, each problem with its place."""

import csv
import gzip
import json
import os
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tune2gguf.data.rows import (
    MAX_ROW_BYTES,
    Source,
    compute_content_digest,
    find_files,
    measure_file,
    read_blocks,
    read_rows,
)

ROWS = [{"prompt": f"Question {number}?", "completion": f"Answer\n{number}."} for number in range(3)]


def write_jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_csv(path):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ROWS[0].keys())
        writer.writeheader()
        writer.writerows(ROWS)


def read(path):
    return [(row.source.line, row.value, row.problem) for row in read_rows(str(path))]


@pytest.mark.parametrize(
    ("name", "write", "lines"),
    [
        ("a.jsonl", write_jsonl, [1, 2, 3]),
        ("a.ndjson", write_jsonl, [1, 2, 3]),
        ("a.json", write_jsonl, [1, 2, 3]),
        ("a.json", lambda path: path.write_text(json.dumps(ROWS)), [1, 2, 3]),
        ("a.json", lambda path: path.write_text(json.dumps(ROWS, indent=1)), [1, 2, 3]),
        # Each answer holds a line break, so a record takes two lines.
        ("a.csv", write_csv, [2, 4, 6]),
        ("a.parquet", lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path), [1, 2, 3]),
    ],
)
def test_every_format_gives_the_same_rows_with_their_lines(tmp_path, name, write, lines):
    write(tmp_path / name)
    assert read(tmp_path / name) == [(line, row, None) for line, row in zip(lines, ROWS, strict=True)]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz"])
def test_gz_is_unpacked(tmp_path, name):
    write_jsonl(tmp_path / "plain")
    (tmp_path / name).write_bytes(gzip.compress((tmp_path / "plain").read_bytes()))
    assert [value for _, value, _ in read(tmp_path / name)] == ROWS


def test_byte_order_mark_blank_lines_and_missing_last_line_break_are_no_rows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}')
    assert read(tmp_path / "a.jsonl") == [(1, {"a": 1}, None), (4, {"a": 2}, None)]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"a": 1', "malformed JSON: Expecting ',' delimiter at column 8"),
        (b"{'a': 1}", "malformed JSON: Expecting property name enclosed in double quotes at column 2"),
        (b"[1, 2]", "a row must be a JSON object, got a list"),
        (b"null", "a row must be a JSON object, got null"),
        (b'"text"', "a row must be a JSON object, got a string"),
        (b'{"a": "\xff"}', "invalid UTF-8 at byte 7 of the line"),
        (b"[" * 100_000, "malformed JSON: nested too deeply"),
        (b'{"a": 2, "b": {"c": 1, "c": 2}}', "malformed JSON: duplicate key 'c' in an object"),
        (
            b'{"a": ' + b"9" * 5000 + b"}",
            "malformed JSON: Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits",
        ),
        (b'{"a": "' + b"x" * 10_000_000 + b'"}', "the row is 9.5 MiB long; the limit is 4 MiB, so split it"),
    ],
)
def test_bad_line_is_named_and_the_lines_around_it_are_read(tmp_path, line, problem):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    assert read(tmp_path / "a.jsonl") == [(1, {"a": 1}, None), (2, None, problem), (3, {"a": 3}, None)]


def test_row_at_the_limit_is_read_and_one_byte_more_is_not(tmp_path):
    fitting = b'{"a": "' + b"x" * (MAX_ROW_BYTES - 10) + b'"}\n'
    assert len(fitting) == MAX_ROW_BYTES
    (tmp_path / "a.jsonl").write_bytes(fitting + b" " + fitting)
    assert [problem is None for _, _, problem in read(tmp_path / "a.jsonl")] == [True, False]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (json.dumps(ROWS[0]).encode("utf-16"), "the file is UTF-16; save it as UTF-8"),
        (gzip.compress(b"{}", mtime=0), "the file is gzip-compressed; its name must end in .gz"),
        (b"PK\x03\x04\x14", "the file is a zip archive; unpack it"),
        (b"PAR1\x15", "the file is a Parquet file; its name must end in .parquet"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "the file is a Git LFS pointer; get the file with"),
        (b'{\n "a": 1\n}\n', r"line 1: a row must be on one line, or all rows in an array: \[{…}, {…}\]"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_file_that_is_not_what_its_name_says_is_one_sentence(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read(tmp_path / name)


def test_array_is_read_whatever_the_file_is_called(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS, indent=1))
    assert [value for _, value, _ in read(tmp_path / "a.jsonl")] == ROWS


def test_csv_row_beyond_the_limit_is_named_and_the_next_is_read(tmp_path):
    (tmp_path / "a.csv").write_text(f'prompt,completion\n"{"x" * 10_000_000}",y\nx,y\n')
    assert read(tmp_path / "a.csv") == [
        (2, None, "the row is 9.5 MiB long; the limit is 4 MiB, so split it"),
        (3, {"prompt": "x", "completion": "y"}, None),
    ]


def test_bad_csv_rows_are_named(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"prompt,completion\nx,y\nx\nx,y,z\nx,\xff\nx,\xc3\xa9\n")
    assert read(tmp_path / "a.csv") == [
        (2, {"prompt": "x", "completion": "y"}, None),
        (3, None, "1 cells, but the header has 2 columns"),
        (4, None, "3 cells, but the header has 2 columns"),
        (5, None, "invalid UTF-8"),
        (6, {"prompt": "x", "completion": "é"}, None),
    ]


def test_messages_in_a_csv_column_are_json(tmp_path):
    (tmp_path / "a.csv").write_text('messages\n"[{""role"": ""user""}]"\nnone\n')
    first, second = read(tmp_path / "a.csv")
    assert first[1] == {"messages": [{"role": "user"}]}
    assert second[2].startswith("column 'messages': malformed JSON")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "a.json",
            b'[{"a": 1},\n {"a" 2}]',
            r"a\.json, row 2: malformed JSON: .* line 2 column 7 .*nothing after it can be read",
        ),
        ("a.json", b'[{"a": 1}\n {"a": 2}]', r"a\.json, row 1: malformed JSON: missing ',' or '\]' after this row"),
        ("a.json", b'[{"a": 1},]', r"a\.json, row 1: malformed JSON: ',' after the last row"),
        ("a.json", b'[{"a": 1, "a": 2}]', r"a\.json, row 1: malformed JSON: duplicate key 'a'"),
        ("a.json", b'[{"a": 1},\n', r"a\.json, row 2: malformed JSON: Expecting value: line 2"),
        ("a.json", b'[{"a": 1}] []', r"a\.json: malformed JSON: text after the end of the array"),
        ("a.json", b'[\n{"a": "\xff"}]', r"a\.json, line 2: invalid UTF-8 at byte 9"),
        ("a.csv", b'a,b\nx,"y\n', r"a\.csv, line 2: malformed CSV: unexpected end of data"),
        ("a.csv", b"a,a\nx,y\n", r"a\.csv, line 1: the header names a column twice"),
        ("a.csv", b"a;b\nx;y\n", r"a\.csv, line 1: the header has one column, 'a;b'; separate columns with commas"),
        ("a.parquet", b"PAR1 nonsense", r"a\.parquet: cannot be read as Parquet"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz: damaged \.gz file"),
        ("a.jsonl.gz", gzip.compress(b"{}\n" * 1000, mtime=0)[:-12], r"a\.jsonl\.gz: damaged \.gz file"),
    ],
)
def test_damage_that_ends_a_file_is_an_error(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read(tmp_path / name)


def test_files_are_found_by_path_and_glob_each_once_and_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.csv"):
        (tmp_path / name).write_text("x")
    found = find_files([f"{tmp_path}/c.csv", f"{tmp_path}/*.jsonl", f"{tmp_path}/a.jsonl"])
    assert found == [f"{tmp_path}/{name}" for name in ("c.csv", "a.jsonl", "b.jsonl")]
    assert find_files(f"{tmp_path}/c.csv") == [f"{tmp_path}/c.csv"]


def test_every_file_that_cannot_be_used_is_named_in_one_error(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "lost.jsonl").symlink_to("missing.jsonl")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    said = {
        "missing.jsonl": "no such file",
        "none*.jsonl": "no such file",
        "someone/chats": "someone/chats: no such file; for the hub data set write hub:someone/chats",
        "empty.jsonl": "the file is empty",
        "a.txt": "unknown type",
        ".": "a folder; name files or a glob",
        "lost.jsonl": "a broken link",
        "loop.jsonl": "a broken link",
        "pipe.jsonl": "not a regular file",
        "hub:name": "hub:OWNER/NAME",
    }
    with pytest.raises(ValueError) as error:
        find_files([str(tmp_path / name) if "hub" not in words else name for name, words in said.items()])
    lines = str(error.value).splitlines()
    assert [words in line for words, line in zip(said.values(), lines, strict=True)] == [True] * len(said)


def test_file_that_may_not_be_read_is_one_sentence():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder) / "a.jsonl"
        path.write_text("{}")
        path.chmod(0)
        user = os.geteuid()
        try:
            if user == 0:  # root may read everything
                os.seteuid(65534)
            with pytest.raises(ValueError, match=r"a\.jsonl: cannot be read \(Permission denied\)"):
                find_files(str(path))
        finally:
            os.seteuid(user)


def test_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(tmp_path / "a.jsonl")
    assert find_files("~/a.jsonl") == [f"{tmp_path}/a.jsonl"]


def test_file_whose_name_holds_glob_characters_is_found(tmp_path):
    (tmp_path / "a[1].jsonl").write_text("x")
    assert find_files(f"{tmp_path}/a[1].jsonl") == [f"{tmp_path}/a[1].jsonl"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet", "array.json"])
def test_progress_goes_from_nothing_to_the_measure_of_the_file(tmp_path, name):
    rows = [{"prompt": f"Question {number}?", "completion": f"Answer {number}. " * 20} for number in range(8000)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "array.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    total, unit = measure_file(str(tmp_path / name))
    positions = [block.position for block in read_blocks(str(tmp_path / name))]
    assert len(positions) > 1 and positions == sorted(positions) and positions[-1] <= total
    assert positions[-1] == total or name == "array.json"
    assert unit == ("row" if name == "a.parquet" else "B")


def test_source_reads_as_a_place():
    assert str(Source("train.jsonl", 17)) == "train.jsonl, line 17"
    assert str(Source("train.parquet", 17, "row")) == "train.parquet, row 17"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("hub:someone/chats", ROWS), ("hub:someone/chats:train[:2]", ROWS[:2]), ("hub:someone/chats:test", ROWS[2:])],
)
def test_hub_data_set_is_read_by_name_and_split(tmp_path, monkeypatch, name, expected):
    """`datasets` takes a local folder of the same name as the repository, like a mirror without network."""
    folder = tmp_path / "someone" / "chats"
    folder.mkdir(parents=True)
    write_jsonl(folder / "train.jsonl")
    write_jsonl(folder / "test.jsonl", ROWS[2:])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert find_files(name) == [name]
    rows = list(read_rows(name))
    assert [row.value for row in rows] == expected
    assert str(rows[0].source) == f"{name}, row 1"
    assert compute_content_digest(name) == compute_content_digest(name)


def test_hub_data_set_that_cannot_be_had_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="hub:someone/else: cannot be loaded from the hub"):
        list(read_rows("hub:someone/else"))
