"""plan.json: what a run said it was about to do."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TypedDict

from tune2gguf.files.atomic import write_json
from tune2gguf.files.json_files import read_json
from tune2gguf.files.records import make_record
from tune2gguf.runs.files import PLAN_FILE


class Plan(TypedDict):
    """`num_steps` counts the optimizer steps of all epochs; `lines` is what the run printed."""

    num_steps: int
    lines: list[str]


def write_plan(run_dir: Path, lines: Sequence[str], *, num_steps: int) -> None:
    """Write plan.json."""
    write_json(run_dir / PLAN_FILE, Plan(num_steps=num_steps, lines=[*lines]))


def read_plan(run_dir: Path) -> Plan:
    """Read plan.json.

    Raises:
        ValueError: if it is missing or not readable
    """
    return read_json(run_dir / PLAN_FILE, partial(make_record, Plan))
