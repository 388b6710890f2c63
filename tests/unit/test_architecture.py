"""docs/architecture.md shows the package as it is."""

import re
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_picture_is_that_of_the_code(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(REPOSITORY / "docs"), *sys.path])
    import draw_architecture

    committed = (REPOSITORY / "docs/architecture.svg").read_text(encoding="utf-8")
    assert committed == draw_architecture.draw(), "python docs/draw_architecture.py"


def test_every_file_that_the_page_names_is_there():
    page = (REPOSITORY / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \d `(\w+)` \|.*\| ([^|]+) \|$", page, re.MULTILINE)
    assert len(rows) == 8
    for room, files in rows:
        for name in re.findall(r"`([\w/.]+)`", files):
            assert (REPOSITORY / "tune2gguf" / room / name).exists(), f"{room}/{name}"
