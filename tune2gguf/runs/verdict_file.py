"""verdict.json: verdict, advice, and the outcome against the parent run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from tune2gguf.files.atomic import write_json
from tune2gguf.files.json_files import read_json
from tune2gguf.files.records import make_record
from tune2gguf.runs.files import VERDICT_FILE


@dataclass(frozen=True)
class Verdict:
    """A verdict: its label, the reasons, and the figures behind it.

    Attributes:
        label: one of verdict.judge.LABELS
        reasons: sentences, the decisive one first
        figures: by name; losses in nats per supervised token, shares as fractions of the gain over the base
    """

    label: str
    reasons: tuple[str, ...]
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Advice:
    """One advice.

    Attributes:
        command: command to copy, for the root of the checkout
        changes: config key -> new value; empty if nothing is trained again
        reason: one or two sentences
        guide_section: section of the fine-tuning guide, such as "4. Balancing Underfitting and Overfitting"
    """

    command: str
    changes: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    guide_section: str = ""


@dataclass(frozen=True)
class Outcome:
    """A run against its parent: losses of their best adapters on the validation rows that both measured.

    Attributes:
        helped: whether the loss fell; None if the interval contains 0
        difference: token-weighted mean loss of this run minus its parent's, in nats
        low, high: 95 % interval of the difference
        rows: number of compared validation rows
        final_difference: the difference of the last adapters
        problem: why there is no comparison; the other fields are then unset
    """

    helped: bool | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    rows: int = 0
    final_difference: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Conclusion:
    """The content of verdict.json. A run that follows no advice has no outcome."""

    verdict: Verdict
    advice: tuple[Advice, ...] = ()
    outcome: Outcome | None = None


def write_conclusion(run_dir: Path, conclusion: Conclusion) -> None:
    """Write verdict.json."""
    content = asdict(conclusion)
    write_json(run_dir / VERDICT_FILE, {**content.pop("verdict"), **content})


def read_conclusion(run_dir: Path) -> Conclusion | None:
    """Read verdict.json; None if the run has not ended.

    Raises:
        ValueError: if it is damaged
    """
    path = run_dir / VERDICT_FILE
    if not path.is_file():
        return None
    return read_json(path, _parse_conclusion)


def _parse_conclusion(values: Any) -> Conclusion:
    advice = tuple(make_record(Advice, entry) for entry in make_record(_Advised, values)["advice"])
    return Conclusion(make_record(Verdict, values), advice, parse_outcome(values.get("outcome")))


def parse_outcome(values: Any) -> Outcome | None:
    """Parse the outcome in verdict.json or the ledger; None if the run follows no advice."""
    return None if values is None else make_record(Outcome, values)


class _Advised(TypedDict):
    advice: list[Any]
