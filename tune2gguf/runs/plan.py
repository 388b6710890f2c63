"""plan.json: what a run said it was about to do."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TypedDict

from tune2gguf.files.atomic import write_json
from tune2gguf.files.json_files import read_json
from tune2gguf.files.records import make_record
from tune2gguf.runs.files import PLAN_FILE

# Of a run that goes on: another layout would round otherwise.
LAYOUT_KEYS = ("tokens_per_pass", "enable_activation_checkpointing")


class _PlanOfVersion1(TypedDict):
    num_steps: int
    lines: list[str]


class Plan(_PlanOfVersion1, total=False):
    """`num_steps` counts the optimizer steps of all epochs; `lines` is what the run printed.

    LAYOUT_KEYS are how the rows of a step go through the model.
    """

    tokens_per_pass: int
    enable_activation_checkpointing: bool


def write_plan(run_dir: Path, plan: Plan) -> None:
    """Write plan.json."""
    write_json(run_dir / PLAN_FILE, plan)


def read_plan(run_dir: Path) -> Plan:
    """Read plan.json.

    Raises:
        ValueError: if it is missing or not readable
    """
    return read_json(run_dir / PLAN_FILE, partial(make_record, Plan))
