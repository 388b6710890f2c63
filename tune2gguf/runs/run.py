"""A run, as its folder tells of it: the one reader that everything after the training uses."""

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
    """A run's folder. Each file is read when it is asked for, once.

    Attributes:
        run_dir: as it is typed in a command
        adapter: `best` or `last`; None takes best where there is one
        moved_base_dir: where the base is now, if not where config.yaml says
        problems: where given, it gathers what cannot be read, and that part is empty; otherwise reading raises
            ValueError with file and reason
    """

    run_dir: Path
    adapter: str | None = None
    moved_base_dir: Path | None = None
    problems: list[str] | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        # resolve(): the name of "." is the folder's, too.
        return self.run_dir.resolve().name

    @property
    def runs_dir(self) -> Path:
        """Where the run folder and the ledger are."""
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
        """config.yaml without levels, its components' keys with dots."""
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
        """verdict.json; None of a run that has not ended."""
        return self._read(read_conclusion, None)

    @cached_property
    def forgetting(self) -> Forgetting | None:
        """forgetting.json; None of a run that did not measure it."""
        return self._read(read_forgetting, None)

    @cached_property
    def num_processes(self) -> int:
        """On how many processes the newest checkpoint was written; 1 where there is none."""
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
        """The type of the GGUF that the adapter was trained over and is served beside; None of a run to be merged."""
        return get_gguf_type(self.base_weights)

    @property
    def base_dir(self) -> Path:
        return Path(self.config["base_dir"]) if self.moved_base_dir is None else self.moved_base_dir

    @property
    def base_source(self) -> str | None:
        """Where base.json says that the base comes from, not what config.yaml asked for; None where nothing says it."""
        source = read_source(self.base_dir)
        return source if source is not None and source.startswith((HUB_SCHEME, PYPI_SCHEME)) else None

    @property
    def base_name(self) -> str:
        """The base's hub repository or package, if it is known, else its folder's name."""
        source = self.base_source
        return self.base_dir.resolve().name if source is None else source.removeprefix(HUB_SCHEME)

    @property
    def chat_template(self) -> ChatTemplate:
        return CHAT_TEMPLATES[self.config["chat_template"]]

    @property
    def system_prompt(self) -> str | None:
        """The one system prompt that every training row had."""
        return self.data.get("system_prompt")

    @cached_property
    def adapter_dir(self) -> Path:
        """The folder of the adapter.

        Raises:
            ValueError: if the run has none, or not the one that was asked for
        """
        if self.adapter is not None and self.adapter not in ADAPTERS:
            raise ValueError(f"unknown adapter {self.adapter!r}; choose from {', '.join(ADAPTERS)}")
        wanted = ADAPTERS if self.adapter is None else (self.adapter,)
        for name in wanted:
            if (self.run_dir / name).is_dir():
                return self.run_dir / name
        names = " or ".join(f"{name}/" for name in wanted)
        raise ValueError(f"{self.run_dir}: has no adapter ({names}); was the run finished?")

    def _read(self, read: Callable[[Path], T], otherwise: T) -> T:
        try:
            return read(self.run_dir)
        except (ValueError, OSError) as error:
            if self.problems is None:
                raise
            self.problems.append(str(error))
            return otherwise


def open_run(run_dir: str | Path, *, adapter: str | None = None, base_dir: str | Path | None = None) -> Run:
    """Open a run to export or to serve it, with all that this needs checked.

    Args:
        adapter, base_dir: as Run's adapter and moved_base_dir

    Raises:
        ValueError: if the run, its adapter or its base is missing, the base is not the one it was trained on, or
            config.yaml is not a run's
    """
    run = Run(Path(run_dir), adapter, None if base_dir is None else Path(base_dir))
    path = run.run_dir / CONFIG_FILE
    missing = [key for key in _EXPORT_KEYS if run.config.get(key) is None]
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(missing)}")
    if run.config["chat_template"] not in CHAT_TEMPLATES:
        raise ValueError(f"{path}: unknown chat_template {run.config['chat_template']!r}")
    if not run.base_dir.is_dir():
        raise ValueError(f"no base model in {run.base_dir}; if it has moved, say where it is with --base-dir")
    recorded = run.environment.get("base_digest")
    # An adapter on another base is another model.
    if recorded is not None and digest_base(run.base_dir) != recorded:
        raise ValueError(
            f"{run.base_dir} is not the base that {run_dir} was trained on, or it has changed since (digests differ); "
            "say where the right one is with --base-dir"
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
        raise ValueError(f"{checkpoints[-1]}: says nothing of the run's processes ({error})") from None


class _Processes(TypedDict):
    processes: int
