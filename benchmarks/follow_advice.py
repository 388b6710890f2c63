"""Does the advice help? From bad starts the printed command is followed, as printed, beside a grid and random choice.

    python benchmarks/follow_advice.py --out runs/advice --devices 0 --jobs 5
    python benchmarks/follow_advice.py --sets labels --starts "rate too low" --rates 1e-3 --epochs 2 --rows 24 \\
        --held-out 12 --record /tmp/advice.jsonl --docs /tmp

Every start is a run, of SmolLM2-135M-Instruct by default, with one thing badly wrong (STARTS). Its first advice is run,
then that run's, up to MAX_FOLLOWED times, until a run says to stop and export. `tune run` is started as this Python's
recipe; nothing else of the command is changed. A line's result is the lowest held-out loss of its runs. Random choice
takes as many runs from the grid, none twice; its mean over all choices is exact. Finished runs are not repeated.
"""

import argparse
import json
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from epoch_chains import SEEN, write_data
from judge_chains import read_held
from recipe_runs import (
    REPOSITORY,
    SMOLLM2,
    add_arguments,
    count_threads,
    do_side_by_side,
    is_finished,
    run_recipe,
    train,
)
from unseen_data import UNSEEN

from tune2gguf.runs.run import Run

RECIPE = "recipes/lora_finetune.py"
BATCH_SIZE, MAX_FOLLOWED, NEAR = 8, 4, 0.03
RESULTS = REPOSITORY / "benchmarks/results/follow_advice.jsonl"
PAGE, FIGURE = "follow_advice.md", "follow_advice.svg"

# The rate that suits this model is 1e-3; of 120 rows two to four epochs do.
USUAL = {"learning_rate": 1e-3, "epochs": 3, "warmup_steps": 5, "batch_size": BATCH_SIZE, "seed": 1}
STARTS = {
    "rate too high": {"learning_rate": 2e-2},
    "rate too low": {"learning_rate": 5e-5},
    "too few epochs": {"epochs": 1, "max_steps_per_epoch": 5, "warmup_steps": 2},
    "too many epochs": {"epochs": 24, "scheduler": "constant", "lora_dropout": 0.0},
    "rank 1": {"lora_rank": 1, "lora_alpha": 1, "epochs": 1},
    "dropout 0.5": {"lora_dropout": 0.5, "epochs": 1},
    "long warm-up": {"warmup_steps": 40},
}


def find_next(run_dir: Path) -> tuple[Path, list[str]] | None:
    """Return the folder and the recipe's arguments of a run's first advice; None where it is no run."""
    command = Run(run_dir).conclusion.advice[0].command
    words = shlex.split(command)
    if words[:2] != ["tune", "run"]:
        return None
    arguments = words[words.index(RECIPE) + 1 :]
    output_dir = next(word for word in arguments if word.startswith("output_dir="))
    return Path(output_dir.removeprefix("output_dir=")), arguments


def describe(run_dir: Path, *, data_set: str, line: str, number: int) -> dict[str, Any]:
    """Return what is kept of a run."""
    run = Run(run_dir)
    verdict, curves = run.conclusion.verdict, run.curves
    advice = run.conclusion.advice[0]
    return {
        "set": data_set,
        "line": line,
        "number": number,
        "base": round(curves.base.loss, 5),
        "best": round(curves.best.loss, 5),
        "rows": curves.final.rows,
        "verdict": verdict.label,
        "advice": advice.changes or advice.command.split()[1],
        "device": run.environment["device"],
        "torch": run.environment["packages"]["torch"],
    }


def follow(run_dir: Path, settings: dict, *, device: str, precision: str, threads: int) -> Iterator[Path]:
    """Yield the folder of the start and of each run that its advice leads to, as they end."""
    if not train(run_dir, settings, device=device, precision=precision, threads=threads):
        return
    yield run_dir
    for _ in range(MAX_FOLLOWED):
        following = find_next(run_dir)
        if following is None:
            return
        run_dir, arguments = following
        again = ["resume=auto"] if run_dir.exists() else []  # one that was stopped
        if not run_recipe(run_dir, [*arguments, *again], device=device, threads=threads):
            return
        yield run_dir


def list_lines(arguments: argparse.Namespace) -> list[tuple[str, str, dict[str, Any]]]:
    """Return set, name and settings of each start and each point of the grid."""
    grid = {
        f"grid {rate:g} x {epochs}": {"learning_rate": rate, "epochs": epochs}
        for rate in arguments.rates
        for epochs in arguments.epochs
    }
    lines = {name: STARTS[name] for name in arguments.starts} | grid
    return [(data_set, name, USUAL | settings) for name, settings in lines.items() for data_set in arguments.sets]


def measure_distance(one: dict, best: float) -> float:
    """Return how far a run is from the best of the grid, as a share of that one's gain."""
    return (one["best"] - best) / (one["base"] - best)


def expect_random(losses: list[float], count: int) -> float:
    """Return the mean of the lowest of `count` losses, over all choices of so many from these."""
    ordered, total = sorted(losses), math.comb(len(losses), count)
    return sum(
        loss * math.comb(len(ordered) - place - 1, count - 1) / total
        for place, loss in enumerate(ordered[: len(ordered) - count + 1])
    )


def make_page(records: list[dict]) -> str:
    lines = ["| set | start | verdicts | distance of each run, % | best | random choice |", "|---" * 6 + "|"]
    distances, near, random_distances = [], 0, []
    for data_set in dict.fromkeys(one["set"] for one in records):
        own = [one for one in records if one["set"] == data_set]
        grid = [one["best"] for one in own if one["line"].startswith("grid")]
        best = min(grid)
        for name in (name for name in STARTS if any(one["line"] == name for one in own)):
            line = sorted((one for one in own if one["line"] == name), key=lambda one: one["number"])
            found = [measure_distance(one, best) for one in line]
            drawn = expect_random(grid, min(len(line), len(grid)))
            random_distance = measure_distance({"base": line[0]["base"], "best": drawn}, best)
            distances.append(min(found))
            random_distances.append(random_distance)
            near += min(found) <= NEAR
            shown = " → ".join(f"{100 * one:.1f}" for one in found)
            verdicts = " → ".join(one["verdict"] for one in line)
            lines.append(
                f"| {data_set} | {name} | {verdicts} | {shown} | {100 * min(found):.1f} | {100 * random_distance:.1f} |"
            )
    where = sorted({f"{one['device']}, torch {one['torch']}" for one in records})
    mean, drawn = (sum(some) / len(some) for some in (distances, random_distances))
    better = sum(mine < other for mine, other in zip(distances, random_distances, strict=True))
    return f"""# The advice, followed

{near} of {len(distances)} starts end within {NEAR:.0%} of the gain of the best run of the grid; in the mean \
{mean:.1%} from it, where random choice of as many runs from the grid is {drawn:.1%} from it. Following is better than \
random choice in {better} of them. ({", ".join(where)})

Distances are shares of the gain of the grid's best run over the base, in held-out loss; below 0 is better than the \
grid. What a start has wrong, and what "random choice" is: `benchmarks/follow_advice.py`, which writes this page.

![Distance of each run of a line]({FIGURE})

{chr(10).join(lines)}
"""


def draw(records: list[dict], path: Path) -> None:
    """Write the distance of each run from the best of the grid, a panel for each set and a line for each start."""
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "follow_advice", "svg.fonttype": "none", "font.size": 9})
    sets = [*dict.fromkeys(one["set"] for one in records)]
    figure, panels = plt.subplots(
        1, len(sets), figsize=(5.5 * len(sets), 3.6), layout="constrained", sharey=True, squeeze=False
    )
    for panel, data_set in zip(panels[0], sets, strict=True):
        own = [one for one in records if one["set"] == data_set]
        best = min(one["best"] for one in own if one["line"].startswith("grid"))
        for name in STARTS:
            line = sorted((one for one in own if one["line"] == name), key=lambda one: one["number"])
            panel.plot(
                [one["number"] for one in line],
                [100 * measure_distance(one, best) for one in line],
                "o-",
                markersize=3,
                label=name,
            )
        panel.axhline(100 * NEAR, color="0.6", linewidth=0.8)
        panel.set(title=data_set, yscale="symlog", xlabel="commands followed")
        panel.set_xticks(range(MAX_FOLLOWED + 1))
        panel.grid(alpha=0.25)
    panels[0][0].set_ylabel("from the grid's best, % of its gain")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, out=Path("runs/advice"))
    parser.add_argument("--sets", nargs="+", choices=[*SEEN, *UNSEEN], default=["translation", "persona"])
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=[*STARTS])
    parser.add_argument("--rates", nargs="+", type=float, default=[2e-4, 1e-3, 3e-3], help="of the grid")
    parser.add_argument("--epochs", nargs="+", type=int, default=[2, 4, 8], help="of the grid")
    parser.add_argument("--model", type=Path, default=SMOLLM2, help="folder of the base")
    parser.add_argument("--rows", type=int, default=120, help="to train on")
    parser.add_argument("--held-out", type=int, default=80)
    parser.add_argument("--record", type=Path, default=RESULTS, help="JSONL of all runs")
    parser.add_argument("--docs", type=Path, default=REPOSITORY / "docs")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    out, record_path = arguments.out.resolve(), arguments.record.resolve()
    sizes = {"num_rows": arguments.rows, "held_out": arguments.held_out}
    files = {name: write_data(out / "data", name, **sizes) for name in arguments.sets}
    options = {"precision": arguments.precision, "threads": count_threads(arguments.devices, arguments.jobs)}
    held = {(one["set"], one["line"], one["number"], isinstance(one["advice"], str)) for one in read_held(record_path)}
    known = {one[:3] for one in held}

    def take(task: tuple[str, str, dict[str, Any]], device: str) -> None:
        data_set, name, settings = task
        run_dir = out / f"{data_set}-{name.replace(' ', '-')}-start"
        settings |= {
            "base_dir": str(arguments.model.resolve()),
            "model.architecture": None,
            "dataset.files": [str(files[data_set][0])],
            "dataset.validation_files": [str(files[data_set][1])],
            "max_val_rows": arguments.held_out,
        }
        is_grid = name.startswith("grid")
        if any(one[:2] == (data_set, name) and (is_grid or one[2] == MAX_FOLLOWED or one[3]) for one in held):
            return
        for number, done in enumerate(follow(run_dir, settings, device=device, **options)):
            if is_finished(done) and (data_set, name, number) not in known:
                line = json.dumps(describe(done, data_set=data_set, line=name, number=number))
                with record_path.open("a", encoding="utf-8") as file:  # one write: lines side by side share the file
                    file.write(f"{line}\n")
            if is_grid:
                break

    do_side_by_side(take, list_lines(arguments), devices=arguments.devices, jobs=arguments.jobs)
    records = read_held(record_path)
    draw(records, arguments.docs / FIGURE)
    (arguments.docs / PAGE).write_text(make_page(records), encoding="utf-8")
    print(f"wrote {arguments.docs / PAGE} and {arguments.docs / FIGURE}")


if __name__ == "__main__":
    main()
