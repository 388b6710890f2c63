"""The commands of README and docs/data.md for one's own data, verbatim, on a tiny base."""

import json
import re
import shlex
import sys

import pytest
import yaml

from tests.conftest import REPOSITORY, make_conversations, write_rows
from tests.recipes.test_commands import run_command
from tune2gguf.data.columns import RowReader
from tune2gguf.data.messages import FORMATS, detect_format, read_conversation


def read_section(page: str = "docs/data.md") -> str:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    return text.split("# Your own data")[1].split("\n## ")[0]


def list_commands(page: str) -> list[list[str]]:
    block = "\n".join(line[4:] for line in read_section(page).splitlines() if line.startswith("    "))
    lines = [line for line in block.replace("\\\n", " ").splitlines() if line.startswith("tune2gguf ")]
    return [[sys.executable, "-m", *shlex.split(line)] for line in lines]


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


def test_readme_fits_on_a_screen_or_two_and_links_every_page_once():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 120
    pages = {path.name: path.read_text(encoding="utf-8") for path in (REPOSITORY / "docs").glob("*.md")}
    linked = re.findall(r"\(docs/(\w+\.md)\)", text)
    assert len(linked) == len(set(linked))
    deeper = {name for page in pages.values() for name in re.findall(r"\((\w+\.md)\)", page)}
    assert linked and pages.keys() == {*linked, *deeper}


def test_every_link_and_picture_of_the_pages_is_there():
    for page in (REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for picture, link in re.findall(r"(?:srcset|src)=\"(\S+)\"|\]\((?!http)([^)#]+)\)", text):
            assert (page.parent / (picture or link)).is_file(), f"{page}: {picture or link}"


@pytest.mark.parametrize(
    ("page", "names_of_commands"),
    [("docs/data.md", ["inspect", "run", "export"]), ("README.md", ["inspect", "run", "export", "chat"])],
)
def test_commands_for_your_own_data_run_in_their_order(page, names_of_commands, tmp_path, tiny_base, run_arguments):
    rows = write_rows(tmp_path / "my.jsonl", make_conversations(60))
    names = {"my.jsonl": rows, "runs/mine": tmp_path / "mine", "models/SmolLM2-135M-Instruct": tiny_base}
    # These overrides make the run tiny, without changing the README's own.
    smaller = [option for option in run_arguments[2:] if not option.startswith(("dataset", "output_dir", "epochs"))]
    # A model with random weights does not end its turn, which the proof would report.
    more = {"run": smaller, "export": ["--proof-rows", "0"], "chat": ["--max-tokens", "4"]}
    commands = list_commands(page)
    assert [command[3] for command in commands] == names_of_commands
    for command in commands:
        command = [
            re.sub("|".join(map(re.escape, names)), lambda found: str(names[found[0]]), part) for part in command
        ]
        done = run_command(command + more.get(command[3], []))
        assert done.returncode == 0, done.stdout + done.stderr
    ledger = json.loads((tmp_path / "mine" / "data.json").read_text())
    assert ledger["read"] == 60 and ledger["validated"] > 0
