"""The data sets of the verdict's runs: equal to their script's output, without duplicate rows."""

import json
import subprocess
import sys

from tests.conftest import REPOSITORY


def test_committed_rows_are_those_of_the_script(tmp_path):
    script = REPOSITORY / "benchmarks/make_verdict_data.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, capture_output=True)
    committed = REPOSITORY / "benchmarks/data"
    names = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.jsonl"))
    assert names == sorted(path.relative_to(committed) for path in committed.rglob("*.jsonl"))
    assert len(names) == 4
    assert all((tmp_path / name).read_bytes() == (committed / name).read_bytes() for name in names)


def test_no_question_is_both_for_training_and_for_validation():
    for folder in (REPOSITORY / "benchmarks/data").iterdir():
        rows = [json.loads(line) for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
        questions = [row["messages"][0]["content"] for row in rows]
        assert len(questions) == len(set(questions)) == 300
