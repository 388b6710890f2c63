"""Hold verdict and forecast against what longer runs came to, and write the page about it.

python benchmarks/judge_chains.py benchmarks/results/chains.jsonl [more.jsonl] [--docs docs]

Forecasts: of runs of epoch_chains.py of which there is one of twice the epochs, on its test rows; and of the runs of
verdict_runs.py at a constant rate, cut after warm-up where a validation stands at twice the steps, on their own rows.

Labels (LABEL_RULE), for chains of several seeds, fixed before the first run; they know nothing of the verdict.
"""

import argparse
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from epoch_chains import read_held
from judge_runs import format_early, make_curves, read_recorded
from recipe_runs import REPOSITORY
from scipy import stats
from unseen_data import UNSEEN

from tune2gguf.runs.curves import Curves
from tune2gguf.runs.intervals import Estimate
from tune2gguf.verdict.judge import GOOD_FIT, LABELS, OVERFITTING, UNDERFITTING, judge
from tune2gguf.verdict.paired import Forecast

PAGE = "verdict_chains.md"
MENDED_ON = ("arithmetic", "persona", "text")  # sets on which the verdict's rule was changed
WARMUP_STEPS = 10  # of the runs of verdict_runs.py
LABEL_RULE = """\
`noise` is twice the standard deviation of the last test loss over seeds, pooled over the epochs of a set and a model.
**overfitting**: the test loss at the best validation is lower than the last one by more than that, in the mean over
seeds; else **underfitting**: twice the epochs lower the last test loss by more than that; else **good fit**. A run
without one of twice the epochs is labelled only where it is overfitting."""


@dataclass(frozen=True)
class Case:
    """A forecast that was printed, and what came: shares of the gain."""

    name: str
    printed: Estimate
    before: Estimate  # what the exponential alone printed
    truth: float


def read_chains(paths: Sequence[Path]) -> dict[tuple, dict[int, dict]]:
    """Return the records by set, model, rate and seed, and by epochs."""
    chains: dict[tuple, dict[int, dict]] = defaultdict(dict)
    for one in (one for path in paths for one in read_held(path)):
        chains[one["data_set"], one["model"], one["learning_rate"], one["seed"]][one["epochs"]] = one
    return dict(sorted(chains.items()))


def list_forecasts(chains: dict[tuple, dict[int, dict]]) -> Iterator[Case]:
    for key, by_epochs in chains.items():
        for epochs, one in sorted(by_epochs.items()):
            if 2 * epochs in by_epochs:
                test = [validation["test"] for validation in one["validations"]]
                further = test[-1] - by_epochs[2 * epochs]["validations"][-1]["test"]
                name = f"{key[0]}, {key[1]}, rate {key[2]:g}, seed {key[3]}, {epochs} → {2 * epochs} epochs"
                yield from make_case(name, make_curves(one), further / (test[0] - test[-1]))
    for run in (one for one in read_recorded() if one.run.kind.settings.get("scheduler") == "constant"):
        losses = {one.step: one.loss for one in run.curves.validations}
        for step in (step for step in losses if step > WARMUP_STEPS and 2 * step in losses):
            kept = tuple(one for one in run.curves.validations if one.step <= step)
            further = (losses[step] - losses[2 * step]) / (losses[0] - losses[step])
            yield from make_case(
                f"{run.run.name}, cut at step {step}", Curves(run.curves.training[:step], kept), further
            )


def make_case(name: str, curves: Curves, truth: float) -> Iterator[Case]:
    """Yield the case, if the verdict on these curves came to a forecast."""
    figures = judge(curves).figures
    if "further_gain" in figures:
        printed, late = (
            Estimate(*(figures[f"{figure}{end}"] for end in ("", "_low", "_high")))
            for figure in ("further_gain", "late_share")
        )
        forecast = Forecast(figures["late_share_at"], float("inf"))
        yield Case(name, printed, late.map(forecast.find_short_tail), truth)


def count_inside(cases: Sequence[Case], kind: str) -> tuple[int, int, int, int]:
    """Return how often the truth lay in the interval, above it and below it, and how often of these the loss rose."""
    intervals = [(getattr(case, kind), case.truth) for case in cases]
    above = sum(truth > one.high for one, truth in intervals)
    below = sum(truth < one.low for one, truth in intervals)
    rose = sum(truth < one.low and truth < 0 for one, truth in intervals)
    return len(cases) - above - below, above, below, rose


def format_forecasts(cases: Sequence[Case]) -> str:
    head = "| interval | runs | truth inside | above | below | of these the loss rose | median error, % of gain |"
    lines = [head, "|---" * 7 + "|"]
    groups = {
        "runs of twice the epochs": [case for case in cases if "→" in case.name],
        "constant-rate runs, cut": [case for case in cases if "→" not in case.name],
    }
    for name, kind in (("as printed", "printed"), ("exponential, rows alone", "before")):
        for group, some in groups.items():
            if some:
                inside, above, below, rose = count_inside(some, kind)
                error = statistics.median(abs(getattr(case, kind).value - case.truth) for case in some)
                share = f"{inside} ({inside / len(some):.0%})"
                lines.append(
                    f"| {name}: {group} | {len(some)} | {share} | {above} | {below} | {rose} | {100 * error:.1f} |"
                )
    return "\n".join(lines)


def format_cases(cases: Sequence[Case]) -> str:
    lines = ["| run | forecast, % of gain | what came |", "|---|---|---|"]
    for case in (case for case in cases if "→" in case.name):
        value, low, high = (100 * number for number in vars(case.printed).values())
        lines.append(f"| {case.name} | {value:.1f} ({low:.1f} … {high:.1f}) | {100 * case.truth:.1f} |")
    return "\n".join(lines)


def label_chains(chains: dict[tuple, dict[int, dict]]) -> list[tuple[tuple, int, str, str]]:
    """Return set, model, rate and seed, epochs, true label and judged label of each run that has a true one."""
    groups: dict[tuple, dict[int, list[tuple[int, dict]]]] = defaultdict(lambda: defaultdict(list))
    for (*key, seed), by_epochs in chains.items():
        for epochs, one in by_epochs.items():
            groups[tuple(key)][epochs].append((seed, one))
    found = []
    for key, by_epochs in groups.items():
        lasts = {epochs: [one["validations"][-1]["test"] for _, one in some] for epochs, some in by_epochs.items()}
        if min(map(len, lasts.values())) < 2:
            continue
        noise = 2 * statistics.mean(statistics.variance(some) for some in lasts.values()) ** 0.5
        for epochs, some in sorted(by_epochs.items()):
            label = find_label(some, lasts, epochs, noise)
            if label is not None:
                found += [((*key, seed), epochs, label, judge(make_curves(one)).label) for seed, one in some]
    return found


def find_label(some: list[tuple[int, dict]], lasts: dict[int, list[float]], epochs: int, noise: float) -> str | None:
    """Return the label by LABEL_RULE; None where it is open."""
    rises = []
    for _, one in some:
        trained = one["validations"][1:]
        best = min(trained, key=lambda validation: sum(validation["rows"]))
        rises.append(trained[-1]["test"] - best["test"])
    if statistics.mean(rises) > noise:
        return OVERFITTING
    if 2 * epochs not in lasts:
        return None
    fall = statistics.mean(lasts[epochs]) - statistics.mean(lasts[2 * epochs])
    return UNDERFITTING if fall > noise else GOOD_FIT


def format_labels(found: Sequence[tuple[tuple, int, str, str]]) -> str:
    """Return the confusion table, the share that is right by set with its interval, and each run that is wrong."""
    lines = ["| true | " + " | ".join(LABELS) + " |", "|---|" + "---|" * len(LABELS)]
    for wanted in (OVERFITTING, UNDERFITTING, GOOD_FIT):
        counts = Counter(judged for _, _, label, judged in found if label == wanted)
        lines.append(f"| {wanted} | " + " | ".join(str(counts[label]) for label in LABELS) + " |")
    lines += ["", "| runs | right | 95 % interval |", "|---|---|---|"]
    test = [one for one in found if one[0][0] not in MENDED_ON]
    sets = {"all": found, "the test sets": test} | {
        name: [one for one in found if one[0][0] == name] for name in sorted({o[0][0] for o in found})
    }
    for name, some in sets.items():
        right = sum(label == judged for *_, label, judged in some)
        interval = stats.binomtest(right, len(some)).proportion_ci(method="wilson")
        lines.append(f"| {name} ({len(some)}) | {right / len(some):.0%} | {interval.low:.0%} … {interval.high:.0%} |")
    wrong = [one for one in found if one[2] != one[3]]
    lines += ["", *(f"- {key[0]}, {key[1]}, rate {key[2]:g}, seed {key[3]}, {epochs} epochs: {label}, judged {judged}"
                    for key, epochs, label, judged in wrong)]  # fmt: skip
    return "\n".join(lines)


def make_page(chains: dict[tuple, dict[int, dict]]) -> str:
    cases = [*list_forecasts(chains)]
    unseen = label_chains({key: one for key, one in chains.items() if key[0] in UNSEEN})
    runs = [make_curves(one) for key, by_epochs in chains.items() if key[0] in UNSEEN for one in by_epochs.values()]
    return f"""# What longer runs came to

`python benchmarks/judge_chains.py` writes this page, by the verdict as it is now, from the runs that
`benchmarks/epoch_chains.py` and `benchmarks/verdict_runs.py` recorded. The figures: [verdict.md](verdict.md).

## Forecasts

How often what as much learning again brought lay in the interval that the run printed.

{format_forecasts(cases)}

Where the loss rose, more training began to overfit: no curve shows that beforehand. These are counted all the same.

{format_cases(cases)}

## Labels on data sets that the rule was not made on

{LABEL_RULE}

{format_labels(unseen)}

Commit ad0ad1e has the rule of the first judging, by which 86 of the 125 were right. It called the other 39 a good fit:
what they had left to gain, or had lost again, was little beside a large gain over the base. The rule was then changed
on {", ".join(MENDED_ON)}; the other sets are the test.

## At a third

What each of these runs says at the first validation from a third of its steps on at which the curve has two points, and
how it was judged at its end.

{format_early([(curves, judge(curves).label) for curves in runs])}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recorded", nargs="+", type=Path)
    parser.add_argument("--docs", type=Path, default=REPOSITORY / "docs")
    arguments = parser.parse_args()
    path = arguments.docs / PAGE
    path.write_text(make_page(read_chains(arguments.recorded)), encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
