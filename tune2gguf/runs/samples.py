"""samples.jsonl: sample replies to validation prompts during training."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tune2gguf.files.records import make_record
from tune2gguf.runs.files import SAMPLES_FILE, read_json_lines


@dataclass(frozen=True)
class Sample:
    """A sample reply to a validation prompt at a step.

    Attributes:
        row: index of the validation row
        prompt: messages with "role", "content" and, if the assistant called tools, "tool_calls"
        reference: the row's own reply
        ended_by_itself: whether the reply ended before the token limit
    """

    step: int
    epoch: int
    row: int
    prompt: tuple[dict[str, Any], ...]
    reference: str
    reply: str
    ended_by_itself: bool


def read_samples(run_dir: Path) -> tuple[Sample, ...]:
    """Read samples.jsonl; empty if the run has none.

    Raises:
        ValueError: if a line other than an incomplete last one is no sample
    """
    path = run_dir / SAMPLES_FILE
    if not path.is_file():
        return ()
    return tuple(read_json_lines(path, partial(make_record, Sample)))
