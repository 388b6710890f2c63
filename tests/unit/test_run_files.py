"""The files of a run's folder: lines end with \\n alone, and what is damaged ends in one line that names it."""

import json

from tune2gguf.runs.files import JsonLinesFile, read_json_lines
from tune2gguf.runs.ledger import Entry, append_entry, read_entries

SEPARATORS = "a\u2028b\u2029c\u0085d\ve\ff\x1cg\r\nh\ri"
ENTRY = Entry(run="a", time="t", config={"epochs": 3}, data="d", base="b", heldout="h", verdict="good fit")


def test_json_lines_end_with_a_line_feed_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    JsonLinesFile(path).write({"text": SEPARATORS})
    with path.open("ab") as file:
        # As another program may write it: unescaped, a carriage return as white space, a line end of Windows.
        file.write(json.dumps({"text": SEPARATORS}, ensure_ascii=False).encode() + b"\r\n")
        file.write(b'{"text":\r"x"}\n\n{"text": "half')
    assert [record["text"] for record in read_json_lines(path)] == [SEPARATORS, SEPARATORS, "x"]


def test_lines_of_the_ledger_end_with_a_line_feed_only(tmp_path):
    append_entry(tmp_path, ENTRY)
    with (tmp_path / "ledger.jsonl").open("ab") as file:
        file.write(
            json.dumps({**vars(ENTRY), "run": SEPARATORS}, ensure_ascii=False).encode().replace(b", ", b",\r") + b"\r\n"
        )
    entries, problems = read_entries(tmp_path)
    assert ([entry.run for entry in entries], problems) == (["a", SEPARATORS], [])
