"""calibration.jsonl: token ids of some training rows, for the export's importance matrix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from tune2gguf.data.tokenize import TokenizedRows
from tune2gguf.files.records import make_record
from tune2gguf.runs.files import CALIBRATION_FILE, read_json_lines

MAX_TOKENS = 4096  # the time of measuring a matrix grows with them


class _Row(TypedDict):
    source: str
    tokens: list[int]


def format_calibration_rows(train: TokenizedRows, *, seed: int) -> str:
    """Return the content of calibration.jsonl: training rows drawn at random, up to MAX_TOKENS tokens in total."""
    lines, num_tokens = [], 0
    for index in np.random.default_rng(seed).permutation(len(train)).tolist():
        row = train[index]
        tokens = row.tokens[: MAX_TOKENS - num_tokens].tolist()
        lines.append(json.dumps({"source": str(row.source), "tokens": tokens}) + "\n")
        num_tokens += len(tokens)
        if num_tokens == MAX_TOKENS:
            break
    return "".join(lines)


def read_calibration_rows(run_dir: Path) -> list[np.ndarray]:
    """Return the token ids of each row; an empty list for a run of an earlier version.

    Raises:
        ValueError: if the file is damaged
    """
    path = run_dir / CALIBRATION_FILE
    return [np.array(row["tokens"]) for row in read_json_lines(path, _parse_row)] if path.is_file() else []


def _parse_row(values: Any) -> _Row:
    return make_record(_Row, values)
