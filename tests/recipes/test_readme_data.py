"""The README's commands for one's own data, as they stand there, on a tiny base."""

import json
import re
import shlex

import pytest
import yaml

from tests.conftest import REPOSITORY, make_conversations, write_rows
from tests.recipes.test_commands import run_command
from tune2gguf.data.columns import RowReader
from tune2gguf.data.messages import FORMATS, detect_format, read_conversation


def read_section() -> str:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    return text.split("## With your own data")[1].split("\n## ")[0]


def list_commands() -> list[list[str]]:
    block = "\n".join(line[4:] for line in read_section().splitlines() if line.startswith("    "))
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines() if not line.startswith(". ")]


def test_every_format_has_a_row_in_the_readme_that_is_detected_as_such():
    shown = dict(re.findall(r"^\| `(\w+)` \| `(\{.*?\})`(?:[: |])", read_section(), flags=re.MULTILINE))
    assert shown.keys() == set(FORMATS)
    for format, row in shown.items():
        assert detect_format(json.loads(row)) == format
        read_conversation(json.loads(row), format=format)


def test_every_mapping_of_the_readme_is_one_of_its_format():
    shown = re.findall(r"^\| `(\w+)` \|.*\| `(\{[^{}]*\})` \|$", read_section(), flags=re.MULTILINE)
    assert [format for format, _ in shown] == list(FORMATS)
    for format, columns in shown:
        assert format in RowReader(columns=tuple(yaml.safe_load(columns).items())).formats


@pytest.mark.slow
def test_commands_for_your_own_data_run_in_their_order(tmp_path, tiny_base, run_arguments):
    rows = write_rows(tmp_path / "my.jsonl", make_conversations(60))
    names = {"my.jsonl": rows, "runs/mine": tmp_path / "mine", "models/SmolLM2-135M-Instruct": tiny_base}
    # What makes the run tiny, but nothing that the README's own command says.
    smaller = [option for option in run_arguments[2:] if not option.startswith(("dataset", "output_dir", "epochs"))]
    # A model of random weights does not end its turn by itself, which a proof would mark.
    more = {"run": smaller, "scripts/export.py": ["--proof-rows", "0"]}
    commands = list_commands()
    assert [command[1].rpartition("/")[2] for command in commands] == [
        "inspect_data.py",
        "run",
        "export.py",
    ]
    for command in commands:
        command = [
            re.sub("|".join(map(re.escape, names)), lambda found: str(names[found[0]]), part) for part in command
        ]
        done = run_command(command + more.get(command[1], []))
        assert done.returncode == 0, done.stdout + done.stderr
    ledger = json.loads((tmp_path / "mine" / "data.json").read_text())
    assert ledger["read"] == 60 and ledger["validated"] > 0
