"""samples.jsonl: validation prompts as the model answered them on the way."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tune2gguf.files.records import make_record
from tune2gguf.runs.files import SAMPLES_FILE, read_json_lines


@dataclass(frozen=True)
class Sample:
    """A validation prompt as the model answered it at a step.

    Attributes:
        row: index of the validation row
        prompt: messages, each of "role" and "content", and of "tool_calls" where the assistant called
        reference: the row's own reply
        ended_by_itself: whether the reply ended before the limit of tokens
    """

    step: int
    epoch: int
    row: int
    prompt: tuple[dict[str, Any], ...]
    reference: str
    reply: str
    ended_by_itself: bool


def read_samples(run_dir: Path) -> tuple[Sample, ...]:
    """Read samples.jsonl; a run without samples has none.

    Raises:
        ValueError: if another line than the last is no sample
    """
    path = run_dir / SAMPLES_FILE
    if not path.is_file():
        return ()
    return tuple(read_json_lines(path, partial(make_record, Sample)))
