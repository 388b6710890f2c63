"""The files of a run folder: only \\n ends a line, and damage gives one line that names the file."""

import html
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.unit.run_folders import CONCLUSION, make_samples, write_run
from tune2gguf.report import write_report
from tune2gguf.runs.files import JsonLinesFile, read_json_lines
from tune2gguf.runs.ledger import Entry, append_entry, read_entries
from tune2gguf.runs.run import Run
from tune2gguf.runs.validation_rows import read_row_losses, read_validation_rows
from tune2gguf.runs.verdict_file import Outcome

SEPARATORS = "a\u2028b\u2029c\u0085d\ve\ff\x1cg\r\nh\ri"
ENTRY = Entry(run="a", time="t", config={"epochs": 3}, data="d", base="b", heldout="h", verdict="good fit")


def test_json_lines_end_with_a_line_feed_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    JsonLinesFile(path).write({"text": SEPARATORS})
    with path.open("ab") as file:
        # Forms of other programs: unescaped, carriage return as white space, Windows line ends.
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


@pytest.fixture
def run_dir(tmp_path) -> Path:
    return write_run(tmp_path / "run", samples=make_samples(), conclusion=CONCLUSION)


# Results of another program, a newer version or a failing disk: valid JSON with the wrong content.
DAMAGE = {
    "data.json": (
        "data",
        [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100_000, {"training": []}, {"files": "x"}, {"notes": None}],
    ),
    "plan.json": ("plan", [b"", b"null", b"\x00" * 40, {"num_steps": "10"}, {"lines": "one"}, {"num_steps": None}]),
    "environment.json": (
        "environment",
        [b"{}{", b"[]", {"version": "2"}, {"packages": []}, {"command": "tune"}, {"resumed": [3]}],
    ),
    "verdict.json": (
        "conclusion",
        [
            b"",
            b"[]",
            {"figures": []},
            {"reasons": None},
            {"reasons": "x"},
            {"advice": ["x"]},
            {"advice": [{"command": 3}]},
            {"label": 3},
            {"outcome": [1]},
            {"outcome": {"rows": "x"}},
            {"figures": {"gain": "x"}},
        ],
    ),
    "samples.jsonl": (
        "samples",
        [
            b"[]\n",
            b"{}\n",
            b"3\n",
            b"{\n{}\n",
            b"[" * 100_000 + b"\n",
            {"step": "1"},
            {"prompt": "x"},
            {"prompt": [1]},
            {"reply": None},
        ],
    ),
    "metrics.jsonl": (
        "curves",
        [
            b"[]\n",
            b"3\n",
            b"{\n{}\n",
            b'"step"\n',
            {"step": "1"},
            {"step": None},
            {"val_loss": "x"},
            {"val_row_losses": ["x"]},
            {"epoch": {}},
        ],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "part", "damage"), [(n, p, d) for n, (p, many) in DAMAGE.items() for d in many])
def test_damaged_file_is_one_line_that_names_it(run_dir, name, part, damage):
    path = run_dir / name
    assert getattr(Run(run_dir), part), "negative control"
    if isinstance(damage, dict):
        first, *rest = path.read_bytes().split(b"\n") if name.endswith("l") else [path.read_bytes()]
        damage = b"\n".join([json.dumps({**json.loads(first), **damage}).encode(), *rest])
    path.write_bytes(damage)
    with pytest.raises(ValueError) as error:
        getattr(Run(run_dir), part)
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < len(str(path)) + 200
    # The report is still written, and shows the problem.
    assert message.replace(str(path), "") in html.unescape(write_report(run_dir).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "line",
    [
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"messages": "x", "text": null}',
        b'{"messages": [{"role": 1, "content": "x"}], "text": null}',
        b'{"messages": [], "text": 3}',
    ],
)
def test_damaged_validation_row_is_one_line_that_names_the_file(run_dir, line):
    path, final = run_dir / "heldout.jsonl", Run(run_dir).curves.final
    path.write_bytes(line + b"\n" + path.read_bytes())
    for read in (read_validation_rows, lambda folder: read_row_losses(folder, final)):
        with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}, line 1: [^\n]+$"):
            read(run_dir)


def test_validation_rows_that_are_fewer_than_were_measured_are_one_line(run_dir):
    path, final = run_dir / "heldout.jsonl", Run(run_dir).curves.final
    path.write_bytes(path.read_bytes().split(b"\n")[0] + b"\n")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: has 1 rows, but row 2 was measured"):
        read_row_losses(run_dir, final)


def test_damaged_progress_is_one_line(run_dir):
    [checkpoint] = (run_dir / "checkpoints").iterdir()
    for content in (b"", b"[]", b"{}", b'{"run": 3}', b'{"run": {"processes": "x"}}'):
        (checkpoint / "progress.json").write_bytes(content)
        with pytest.raises(ValueError, match=rf"^{re.escape(str(checkpoint))}[^\n]+$"):
            _ = Run(run_dir).num_processes


FOREIGN = [
    b"[]",
    b"3",
    b"null",
    b'"text"',
    b"{}",
    b"\xff\x00",
    b"[" * 100_000,
    b"1" * 5000,
    b"{" + b'"a":' * 3,
    {"run": ["a"]},
    {"run": 3},
    {"config": []},
    {"config": "x"},
    {"parent_run": {}},
    {"advice": None},
    {"advice": [3]},
    {"best": "x"},
    {"outcome": []},
    {"outcome": {"rows": "x"}},
    {"data": []},
    {"base": {}},
    {"heldout": 3},
    {"verdict": None},
]


@pytest.mark.parametrize("foreign", FOREIGN)
def test_foreign_line_of_the_ledger_is_skipped_and_said(tmp_path, foreign):
    append_entry(tmp_path, ENTRY)
    with (tmp_path / "ledger.jsonl").open("ab") as file:
        line = foreign if isinstance(foreign, bytes) else json.dumps({**asdict(ENTRY), "run": "b", **foreign}).encode()
        file.write(line + b"\n")
    append_entry(tmp_path, replace(ENTRY, run="c"))
    entries, [problem] = read_entries(tmp_path)
    assert [entry.run for entry in entries] == ["a", "c"]
    assert problem.startswith(f"{tmp_path / 'ledger.jsonl'}, line 2: skipped") and "\n" not in problem
    assert len(problem) < len(str(tmp_path)) + 200


def test_entry_of_a_newer_version_is_read_as_far_as_it_is_known(tmp_path):
    outcome = Outcome(helped=True, difference=-0.1, low=-0.2, high=-0.05, rows=9, final_difference=-0.1)
    newer = {**asdict(replace(ENTRY, outcome=outcome)), "new": {"deep": [1]}}
    newer["outcome"]["new"] = 3
    (tmp_path / "ledger.jsonl").write_text(json.dumps(newer) + "\n")
    assert read_entries(tmp_path) == ([replace(ENTRY, outcome=outcome)], [])


def test_verdict_and_samples_of_a_newer_version_are_read_as_far_as_they_are_known(run_dir):
    conclusion, samples = Run(run_dir).conclusion, Run(run_dir).samples
    verdict = json.loads((run_dir / "verdict.json").read_text())
    verdict["new"] = verdict["advice"][0]["new"] = 1
    (run_dir / "verdict.json").write_text(json.dumps(verdict))
    lines = [
        json.dumps({**json.loads(line), "new": 1}) for line in (run_dir / "samples.jsonl").read_text().split("\n")[:-1]
    ]
    (run_dir / "samples.jsonl").write_text("\n".join(lines) + "\n")
    assert (Run(run_dir).conclusion, Run(run_dir).samples) == (conclusion, samples)
