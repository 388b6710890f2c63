"""plan.json: the plan that a run printed before it started."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TypedDict

from tune2gguf.files.atomic import write_json
from tune2gguf.files.json_files import read_json
from tune2gguf.files.records import make_record
from tune2gguf.runs.files import PLAN_FILE

# A resumed run keeps these: another layout would round differently.
LAYOUT_KEYS = ("tokens_per_pass", "enable_activation_checkpointing")


class _PlanOfVersion1(TypedDict):
    num_steps: int
    lines: list[str]


class Plan(_PlanOfVersion1, total=False):
    """The content of plan.json.

    `num_steps` counts the optimizer steps of all epochs; `lines` are the printed lines. LAYOUT_KEYS say how a step's
    rows are split into passes.
    """

    tokens_per_pass: int
    enable_activation_checkpointing: bool


def write_plan(run_dir: Path, plan: Plan) -> None:
    """Write plan.json."""
    write_json(run_dir / PLAN_FILE, plan)


def read_plan(run_dir: Path) -> Plan:
    """Read plan.json.

    Raises:
        ValueError: if it is missing or damaged
    """
    return read_json(run_dir / PLAN_FILE, partial(make_record, Plan))
