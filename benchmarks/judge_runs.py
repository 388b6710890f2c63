"""Judge the recorded runs of verdict_runs.py with the current verdict, and write the page with the results.

python benchmarks/judge_runs.py [--recorded benchmarks/results/verdict_runs.jsonl] [--docs docs]
"""

import argparse
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from recipe_runs import REPOSITORY
from verdict_runs import DATA_SETS, KINDS, Run

from tune2gguf.runs.curves import Curves, TrainingStep, Validation
from tune2gguf.runs.files import read_json_lines
from tune2gguf.verdict.early import RECORDED as EARLY_RECORDED
from tune2gguf.verdict.early import Outlook, foresee, is_due
from tune2gguf.verdict.judge import LABELS, OVERFITTING, UNDERFITTING, Verdict, judge

RECORDED = REPOSITORY / "benchmarks/results/verdict_runs.jsonl"
PAGE, FIGURE = "verdict_runs.md", "verdict_runs.svg"
# Numbers of a run's validation rows to judge it on again, and draws of each.
FEWER_ROWS, NUM_DRAWS = (6, 10, 20, 40), 5
COLORS = dict(zip(KINDS, ("#c4601d", "#6f4bb5", "#b8508e", "#0b5cad", "#6a6f78"), strict=True))


@dataclass(frozen=True)
class JudgedRun:
    """A recorded run and its verdict."""

    run: Run
    curves: Curves
    verdict: Verdict
    made_on: str  # device and torch
    started: str

    @property
    def is_right(self) -> bool:
        return self.verdict.label == self.run.kind.expected


def read_recorded(path: Path = RECORDED) -> list[JudgedRun]:
    """Judge the recorded runs of a file; return them in the order of data sets and kinds."""
    judged = []
    for data in read_json_lines(path):
        match = re.fullmatch(rf"({'|'.join(DATA_SETS)})-({'|'.join(KINDS)})-(\d+)", data["run"])
        run, curves = Run(match[1], match[2], int(match[3])), make_curves(data)
        made_on = f"{data['device']}, torch {data['torch']}"
        judged.append(JudgedRun(run, curves, judge(curves), made_on, data["started"]))
    sets, kinds = [*DATA_SETS], [*KINDS]
    return sorted(judged, key=lambda one: (kinds.index(one.run.kind_name), sets.index(one.run.data_set), one.run.seed))


def make_curves(data: dict) -> Curves:
    """Return the curves of a record from verdict_runs.describe_run."""
    tokens = tuple(data["row_tokens"])
    training = [
        TrainingStep(step=number, epoch=0, loss=loss, lr=lr)
        for number, (loss, lr) in enumerate(zip(data["loss"], data["lr"], strict=True), start=1)
    ]
    return Curves(
        tuple(training),
        tuple(_make_validation(one["step"], one["epoch"], one["rows"], tokens) for one in data["validations"]),
    )


def _make_validation(step: int, epoch: int, losses: Sequence[float], tokens: Sequence[int]) -> Validation:
    return Validation(
        step=step,
        epoch=epoch,
        loss=sum(losses) / sum(tokens),
        rows=len(tokens),
        tokens=sum(tokens),
        row_losses=tuple(losses),
        row_tokens=tuple(tokens),
    )


def take_rows(curves: Curves, rows: Sequence[int]) -> Curves:
    """Return the curves over these validation rows only."""
    validations = [
        _make_validation(
            one.step, one.epoch, [one.row_losses[row] for row in rows], [one.row_tokens[row] for row in rows]
        )
        for one in curves.validations
    ]
    return Curves(curves.training, tuple(validations))


def foresee_early(curves: Curves) -> Outlook | None:
    """Return the label that the run forecast at a third of its steps, or None."""
    num_steps = len(curves.training)
    for number in range(1, len(curves.trained) + 1):
        last = curves.trained[number - 1].step
        kept = tuple(one for one in curves.validations if one.step <= last)
        cut = Curves(curves.training[:last], kept)
        if is_due(cut, num_steps):
            rates = [step.lr or 0.0 for step in curves.training]
            return foresee(cut, learned=sum(rates[:last]) / sum(rates))
    return None


def format_early(runs: Sequence[tuple[Curves, str]]) -> str:
    """Return a Markdown table: final labels by the label forecast at a third."""
    told = [(foresee_early(curves), label) for curves, label in runs]
    lines = ["| told at a third | " + " | ".join(LABELS) + " |", "|---|" + "---|" * len(LABELS)]
    for likely in (*EARLY_RECORDED, None):
        counts = Counter(label for outlook, label in told if (outlook.label if outlook else None) == likely)
        lines.append(f"| {likely or 'nothing'} | " + " | ".join(str(counts[label]) for label in LABELS) + " |")
    return "\n".join(lines)


def format_table(judged: Sequence[JudgedRun]) -> str:
    """Return the runs as a Markdown table. Wrong labels are bold."""
    lines = [
        "| run | made to be | judged | base | best (step) | final (step) | rise, % of gain | further gain, % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in judged:
        base, best, final, label = one.curves.base, one.curves.best, one.curves.final, one.verdict.label
        shares = [format_share(one.verdict.figures, name) for name in ("rise", "further_gain")]
        lines.append(
            f"| {one.run.name} | {one.run.kind.expected} | {label if one.is_right else f'**{label}**'} "
            f"| {base.loss:.3f} | {best.loss:.3f} ({best.step}) | {final.loss:.3f} ({final.step}) "
            f"| {' | '.join(shares)} |"
        )
    return "\n".join(lines)


def format_share(figures: dict[str, float], name: str) -> str:
    """Return a share with its interval, in percent, or a dash if the verdict has none."""
    if name not in figures:
        return "–"
    return "{:.1f} ({:.1f} … {:.1f})".format(*(100 * figures[key] for key in (name, f"{name}_low", f"{name}_high")))


def count_reversed(pairs: Sequence[tuple[str, str]]) -> int:
    """Count the pairs (expected, judged) that take overfitting for underfitting or the reverse."""
    return sum({expected, label} == {OVERFITTING, UNDERFITTING} for expected, label in pairs)


def judge_on_fewer_rows(judged: Sequence[JudgedRun]) -> dict[int, list[tuple[str, str]]]:
    """Return number of rows -> (expected, judged) labels of each run, on rows drawn from its own."""
    generator, found = np.random.default_rng(0), {}
    for num_rows in FEWER_ROWS:
        found[num_rows] = [
            (one.run.kind.expected, judge(take_rows(one.curves, rows)).label)
            for one in judged
            if one.curves.final.rows >= num_rows and one.run.kind.num_validation_rows is None
            for rows in (generator.choice(one.curves.final.rows, num_rows, replace=False) for _ in range(NUM_DRAWS))
        ]
    return found


def format_fewer_rows(found: dict[int, list[tuple[str, str]]]) -> str:
    """Return a Markdown table: counts of judged labels by number of rows and expected label."""
    lines = ["| rows | made to be | " + " | ".join(LABELS) + " |", "|---|---|" + "---|" * len(LABELS)]
    for num_rows, pairs in found.items():
        for expected in dict.fromkeys(expected for expected, _ in pairs):
            counts = Counter(label for wanted, label in pairs if wanted == expected)
            lines.append(f"| {num_rows} | {expected} | " + " | ".join(str(counts[label]) for label in LABELS) + " |")
    return "\n".join(lines)


def draw_curves(judged: Sequence[JudgedRun], path: Path) -> None:
    """Plot the validation loss of every run over the fraction of its steps, one panel per data set."""
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "verdict_runs", "svg.fonttype": "none", "font.size": 9})
    figure, panels = plt.subplots(1, len(DATA_SETS), figsize=(11, 3.6), layout="constrained")
    for panel, name in zip(panels, DATA_SETS, strict=True):
        shown = set()
        for one in (one for one in judged if one.run.data_set == name):
            kind, lines = one.run.kind_name, one.curves.validations
            label = None if kind in shown else f"{kind}: {one.run.kind.expected}"
            shown.add(kind)
            fractions = [line.step / one.curves.final.step for line in lines]
            panel.plot(fractions, [line.loss for line in lines], color=COLORS[kind], linewidth=1.2, label=label)
            panel.plot(fractions[-1], one.curves.final.loss, "o", color=COLORS[kind], markersize=3)
        panel.set(title=name, yscale="log", xlabel="fraction of the run's steps")
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("validation loss, nats a token")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(KINDS), frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def make_page(judged: Sequence[JudgedRun]) -> str:
    """Return the page of the judged runs."""
    pairs = [(one.run.kind.expected, one.verdict.label) for one in judged]
    right, fewer = sum(one.is_right for one in judged), judge_on_fewer_rows(judged)
    by_kind = "\n".join(f"- {describe_kind(name, judged)}" for name in KINDS)
    days = sorted({one.started[:10] for one in judged})
    return f"""# The verdict on real runs

{right} of {len(judged)} right ({right / len(judged):.0%}); {count_reversed(pairs)} taken for the reverse, an overfit \
for an underfit or back.

SmolLM2-135M-Instruct on three data sets: the quickstart's conversations (259 to train on, 40 for validation), orders \
as JSON and unit conversions with their step (220 and 80 each). Each run was made to come out as one label, which was \
written down before the first run (`KINDS` in `benchmarks/verdict_runs.py`):

{by_kind}

Made {" to ".join(dict.fromkeys((days[0], days[-1])))} with

    python benchmarks/verdict_runs.py --out runs/verdict --devices 0 --jobs 6   # or cpu, see above
    python benchmarks/verdict_runs.py --out runs/verdict --no-training --record benchmarks/results/verdict_runs.jsonl

This page is `python benchmarks/judge_runs.py`, on the recorded runs with the verdict as it is now. What each figure \
means: [verdict.md](verdict.md).

![Validation loss of each run]({FIGURE})

{format_table(judged)}

## At a third

What each run says at the first validation from a third of its steps on at which the curve has two points, and how it
was judged at its end.

{format_early([(one.curves, one.verdict.label) for one in judged])}

## On fewer rows

The same runs, each judged {NUM_DRAWS} times on rows drawn from its validation ones; how often which label. \
{sum(map(count_reversed, fewer.values()))} of {sum(map(len, fewer.values()))} are taken for the reverse.

{format_fewer_rows(fewer)}
"""


def describe_kind(name: str, judged: Sequence[JudgedRun]) -> str:
    """Return a kind's settings, expected label and devices as text."""
    kind, made_on = KINDS[name], sorted({one.made_on for one in judged if one.run.kind_name == name})
    settings = ", ".join(f"{key} {value}" for key, value in kind.settings.items())
    rows = "" if kind.num_rows is None else f"{kind.num_rows} rows to train on, "
    rows += "" if kind.num_validation_rows is None else f"{kind.num_validation_rows} validation rows, "
    return f"`{name}`, to be **{kind.expected}**: {rows}{settings} (on {' and '.join(made_on)})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Judge recorded runs, and write the page about it.")
    parser.add_argument("--recorded", type=Path, default=RECORDED)
    parser.add_argument("--docs", type=Path, default=REPOSITORY / "docs")
    arguments = parser.parse_args()
    judged = read_recorded(arguments.recorded)
    draw_curves(judged, arguments.docs / FIGURE)
    (arguments.docs / PAGE).write_text(make_page(judged), encoding="utf-8")
    print(f"wrote {arguments.docs / PAGE} and {arguments.docs / FIGURE}")


if __name__ == "__main__":
    main()
