"""Data inspection: what scripts/inspect_data.py prints and writes. Data is read as a run would read it."""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from tune2gguf.config import read_config
from tune2gguf.config.check import check_values
from tune2gguf.config.keys import KEYS, find_value_problems
from tune2gguf.config.names import suggest
from tune2gguf.config.plan import raise_problems
from tune2gguf.config.read import apply_overrides
from tune2gguf.data.html import draw_png, make_html
from tune2gguf.data.prepare import chat_dataset, check_files
from tune2gguf.data.show import format_row, format_summary
from tune2gguf.data.summary import DataSummary, summarize_data
from tune2gguf.data.tokenize import TokenizedRow
from tune2gguf.files.atomic import write_file
from tune2gguf.guide import GUIDE_PARAMETERS
from tune2gguf.tokenizer.tokenizer import ChatTokenizer, load_tokenizer

# For files without a config: the guide's batch size and the configs' accumulation.
BATCH_SIZE, ACCUMULATION_STEPS = 2, 4
# The default seed of a run, which holds out the same rows.
_GUIDE_SEED = next(parameter.default for parameter in GUIDE_PARAMETERS if parameter.key == "seed")


@dataclass(frozen=True)
class Inspection:
    """A summary with a few of the training rows."""

    summary: DataSummary
    rows: list[TokenizedRow]
    tokenizer: ChatTokenizer

    def format(self, *, colored: bool) -> str:
        """Return the figures and the rows as text."""
        shown = [format_row(row, self.tokenizer, colored=colored) for row in self.rows]
        return "\n\n".join([format_summary(self.summary), *shown])

    def write_html(self, path: Path) -> Path:
        """Write figures and rows as a page to a new file."""
        return _write_new(path, make_html(self.summary, self.rows, self.tokenizer).encode())

    def write_png(self, path: Path) -> Path:
        """Write the histogram of tokens per row as a picture to a new file."""
        return _write_new(path, draw_png(self.summary))


def check_outputs(*paths: Path | None) -> None:
    """Raise ValueError if a file exists or its folder does not. To be called before the data is read."""
    for path in filter(None, paths):
        if path.exists():
            raise ValueError(f"{path} exists already and is not overwritten; remove it or choose another file")
        if not path.parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.parent}; create it or choose another")


def _write_new(path: Path, content: bytes) -> Path:
    check_outputs(path)
    with write_file(path) as unfinished:
        unfinished.write_bytes(content)
    return path


def inspect_config(path: Path, overrides: list[str], *, num_rows: int) -> Inspection:
    """Inspect the data of a run's config, with `key=value` overrides as for the run.

    Raises:
        ValueError: if config, tokenizer or data cannot be read, or a key or value is wrong
    """
    config = read_config(path, overrides)
    check_values(config)
    dataset = OmegaConf.to_container(config.dataset, resolve=True)
    dataset.pop("_component_")
    return _inspect(
        dataset,
        base_dir=config.base_dir,
        chat_template=config.chat_template,
        num_rows=num_rows,
        max_seq_len=config.max_seq_len,
        seed=config.seed,
        batch_size=config.batch_size,
        accumulation_steps=config.gradient_accumulation_steps,
    )


def inspect_files(
    arguments: Sequence[str], base_dir: Path, *, chat_template: str, max_seq_len: int, num_rows: int
) -> Inspection:
    """Inspect data files with the tokenizer of a base folder.

    Args:
        arguments: chat_dataset's files, its other options as dataset.KEY=VALUE, and seed=N

    Raises:
        ValueError: if tokenizer or data cannot be read, or an option is wrong
    """
    if max_seq_len < 2:  # one to predict from, one to predict
        raise ValueError(f"max_seq_len={max_seq_len} must be at least 2")
    overrides = [argument for argument in arguments if re.match(r"(dataset\.[\w.]+|seed)=", argument)]
    files = [argument for argument in arguments if argument not in overrides]
    options, seed = _read_options(overrides)
    return _inspect(
        {**({"files": files} if files or "sources" not in options else {}), **options},
        base_dir=base_dir,
        chat_template=chat_template,
        num_rows=num_rows,
        max_seq_len=max_seq_len,
        seed=seed,
        batch_size=BATCH_SIZE,
        accumulation_steps=ACCUMULATION_STEPS,
    )


def _read_options(overrides: list[str]) -> tuple[dict[str, Any], int]:
    """Return the options of chat_dataset, and the seed, as a run would read them."""
    config = OmegaConf.create({"dataset": {}, "seed": _GUIDE_SEED})
    apply_overrides(config, overrides)
    raise_problems(find_value_problems("seed", config.seed, KEYS["seed"]))
    options = OmegaConf.to_container(config.dataset)
    known = inspect.signature(chat_dataset).parameters.keys() - {"files", "tokenizer", "max_seq_len", "seed"}
    for key in options:
        if key not in known:
            raise ValueError(f"unknown key 'dataset.{key}'{suggest(f'dataset.{key}', sorted(known))}")
    return options, config.seed


def _inspect(
    dataset: dict[str, Any], *, base_dir: str | Path, chat_template: str, num_rows: int, seed: int, **run: int
) -> Inspection:
    if num_rows < 0:
        raise ValueError(f"num_rows={num_rows} must be at least 0")
    problems = check_files(dataset)
    if problems:
        raise ValueError("\n".join(problems))
    tokenizer = load_tokenizer(base_dir, chat_template=chat_template)
    summary = summarize_data(dataset, tokenizer=tokenizer, seed=seed, **run)
    train = summary.data.train
    drawn = random.Random(seed).sample(range(len(train)), min(num_rows, len(train)))
    return Inspection(summary, [train[index] for index in sorted(drawn)], tokenizer)
