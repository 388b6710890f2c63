"""The reader of a run folder, for everything after training."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from tune2gguf.base.digest import digest_base
from tune2gguf.base.gguf_rounding import get_gguf_type
from tune2gguf.base.source import HUB_SCHEME, PYPI_SCHEME, read_source
from tune2gguf.data.ledger import RowLedger
from tune2gguf.files.json_files import read_json
from tune2gguf.files.records import make_record
from tune2gguf.runs.checkpoints import list_checkpoints, read_progress
from tune2gguf.runs.config_file import flatten_config, read_config
from tune2gguf.runs.curves import Curves, read_curves
from tune2gguf.runs.environment import Environment, read_environment
from tune2gguf.runs.files import CONFIG_FILE, DATA_FILE
from tune2gguf.runs.forgetting import Forgetting, read_forgetting
from tune2gguf.runs.plan import Plan, read_plan
from tune2gguf.runs.samples import Sample, read_samples
from tune2gguf.runs.verdict_file import Conclusion, read_conclusion
from tune2gguf.tokenizer.templates import CHAT_TEMPLATES, ChatTemplate

BEST, LAST = "best", "last"
ADAPTERS = (BEST, LAST)
_EXPORT_KEYS = ("base_dir", "base_weights", "chat_template", "max_seq_len", "quantization")

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """A run folder; each file is read once, on first access.

    Attributes:
        run_dir: path as typed in a command
        adapter: `best` or `last`; None: best if it exists, else last
        moved_base_dir: the base's folder, if not the one in config.yaml
        problems: collects read errors, and the unreadable part is empty; None: reading raises ValueError with file
            and reason
    """

    run_dir: Path
    adapter: str | None = None
    moved_base_dir: Path | None = None
    problems: list[str] | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        # resolve() turns "." into the folder's name.
        return self.run_dir.resolve().name

    @property
    def runs_dir(self) -> Path:
        """The folder of the run folder and the ledger."""
        return self.run_dir.resolve().parent

    @property
    def export_dir(self) -> Path:
        return self.run_dir / "export"

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.yaml, resolved."""
        return self._read(read_config, {})

    @cached_property
    def flat_config(self) -> dict[str, Any]:
        """config.yaml, resolved and flat: nested keys are joined with dots."""
        return flatten_config(self.config)

    @cached_property
    def environment(self) -> Environment:
        return self._read(read_environment, {})

    @cached_property
    def data(self) -> RowLedger:
        """data.json."""
        return self._read(_read_data, {})

    @cached_property
    def plan(self) -> Plan:
        return self._read(read_plan, {})

    @cached_property
    def curves(self) -> Curves:
        """metrics.jsonl."""
        return self._read(read_curves, Curves())

    @cached_property
    def samples(self) -> tuple[Sample, ...]:
        return self._read(read_samples, ())

    @cached_property
    def conclusion(self) -> Conclusion | None:
        """verdict.json; None if the run has not ended."""
        return self._read(read_conclusion, None)

    @cached_property
    def forgetting(self) -> Forgetting | None:
        """forgetting.json; None if the run did not measure it."""
        return self._read(read_forgetting, None)

    @cached_property
    def num_processes(self) -> int:
        """The number of processes that wrote the newest checkpoint; 1 without checkpoints."""
        return self._read(_read_num_processes, 1)

    @cached_property
    def parent_run(self) -> str | None:
        """The run whose advice this one follows, relative to runs_dir."""
        parent = self.config.get("parent_run")
        return None if parent is None else os.path.relpath(Path(parent).resolve(), self.runs_dir)

    @property
    def max_seq_len(self) -> int:
        return self.config["max_seq_len"]

    @property
    def quantization(self) -> str:
        return self.config["quantization"]

    @property
    def base_weights(self) -> str:
        return self.config["base_weights"]

    @property
    def gguf_type(self) -> str | None:
        """The GGUF type that the adapter was trained over and is served with; None if the adapter is to be merged."""
        return get_gguf_type(self.base_weights)

    @property
    def base_dir(self) -> Path:
        return Path(self.config["base_dir"]) if self.moved_base_dir is None else self.moved_base_dir

    @property
    def base_source(self) -> str | None:
        """The base's source in base.json, which may differ from config.yaml's base_source; None if unknown."""
        source = read_source(self.base_dir)
        return source if source is not None and source.startswith((HUB_SCHEME, PYPI_SCHEME)) else None

    @property
    def base_name(self) -> str:
        """The base's hub repository or package if known, else its folder's name."""
        source = self.base_source
        return self.base_dir.resolve().name if source is None else source.removeprefix(HUB_SCHEME)

    @property
    def chat_template(self) -> ChatTemplate:
        return CHAT_TEMPLATES[self.config["chat_template"]]

    @property
    def system_prompt(self) -> str | None:
        """The system prompt that all training rows share, if any."""
        return self.data.get("system_prompt")

    @cached_property
    def adapter_dir(self) -> Path:
        """The folder of the adapter.

        Raises:
            ValueError: if the run has no adapter, or not the requested one
        """
        if self.adapter is not None and self.adapter not in ADAPTERS:
            raise ValueError(f"unknown adapter {self.adapter!r}; choose from {', '.join(ADAPTERS)}")
        wanted = ADAPTERS if self.adapter is None else (self.adapter,)
        for name in wanted:
            if (self.run_dir / name).is_dir():
                return self.run_dir / name
        names = " or ".join(f"{name}/" for name in wanted)
        raise ValueError(f"{self.run_dir}: has no adapter ({names}); check that the run has finished")

    def _read(self, read: Callable[[Path], T], otherwise: T) -> T:
        try:
            return read(self.run_dir)
        except (ValueError, OSError) as error:
            if self.problems is None:
                raise
            self.problems.append(str(error))
            return otherwise


def open_run(run_dir: str | Path, *, adapter: str | None = None, base_dir: str | Path | None = None) -> Run:
    """Open a run for export or serving, and check everything that these need.

    Args:
        adapter, base_dir: Run's adapter and moved_base_dir

    Raises:
        ValueError: if the run, its adapter or its base is missing, the base is not the one that the run trained on, or
            config.yaml is not a run's
    """
    run = Run(Path(run_dir), adapter, None if base_dir is None else Path(base_dir))
    path = run.run_dir / CONFIG_FILE
    missing = [key for key in _EXPORT_KEYS if run.config.get(key) is None]
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(missing)}")
    if run.config["chat_template"] not in CHAT_TEMPLATES:
        raise ValueError(
            f"{path}: unknown chat_template {run.config['chat_template']!r}; choose from {', '.join(CHAT_TEMPLATES)}"
        )
    if not run.base_dir.is_dir():
        raise ValueError(f"no base model in {run.base_dir}; if it was moved, give its folder with --base-dir")
    recorded = run.environment.get("base_digest")
    # An adapter on another base is another model.
    if recorded is not None and digest_base(run.base_dir) != recorded:
        raise ValueError(
            f"{run.base_dir} is not the base that {run_dir} was trained on, or it has changed since (digests differ); "
            "give the right folder with --base-dir"
        )
    _ = run.adapter_dir
    return run


def _read_data(run_dir: Path) -> RowLedger:
    return read_json(run_dir / DATA_FILE, partial(make_record, RowLedger))


def _read_num_processes(run_dir: Path) -> int:
    checkpoints = list_checkpoints(run_dir / "checkpoints")
    if not checkpoints:
        return 1
    try:
        return make_record(_Processes, read_progress(checkpoints[-1]).get("run"))["processes"]
    except ValueError as error:
        raise ValueError(f"{checkpoints[-1]}: lacks the number of processes ({error})") from None


class _Processes(TypedDict):
    processes: int
