"""What to run next: the fine-tuning guide's adjustments as complete commands, most effective first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tune2gguf.commands import format_overrides, format_run, format_script, format_value
from tune2gguf.guide import GUIDE_PARAMETERS
from tune2gguf.runs.curves import Curves
from tune2gguf.runs.files import GENERAL_FILE
from tune2gguf.runs.forgetting import Forgetting
from tune2gguf.runs.verdict_file import Advice, Verdict
from tune2gguf.verdict.judge import GOOD_FIT, OVERFITTING, UNDERFITTING

LEARNING_RATE = "5.1. Learning Rate"
EPOCHS = "5.2. Epochs"
ADDITIONAL = "5.3. Additional Fine-Tuning Parameters"
ITERATING = "6. The Iterative Fine-Tuning Process"
CHOOSING = "3. Choosing the Right Model"

# Keys that change a run's fit. Other differences between two runs do not answer a verdict.
FIT_KEYS = (*(one.key for one in GUIDE_PARAMETERS if one.key not in ("seed", "quantization")), "max_steps_per_epoch")
# The guide's values, a step of an adjustment apart.
DROPOUTS = (0.0, 0.1, 0.2, 0.3)
WEIGHT_DECAYS = (0.0, 0.001, 0.01, 0.1)
STARTING_RATE = 1e-4
# A forecast of so much more, as a share of the gain, is far from flat: four times the epochs, not twice.
FAR_FROM_FLAT = 0.25
# KL divergence from the base in nats per token of the base's answers; see docs/verdict.md.
NOTABLE_DIVERGENCE = 0.1
# General rows per row of the user's, and the number of prompts for them.
GENERAL_SHARE, MAX_GENERAL_ROWS = 0.25, 100
LARGER = {"smollm2_135m": "llama3_2_1b", "llama3_2_1b": "llama3_2_3b", "llama3_2_3b": "llama3_1_8b"}


@dataclass(frozen=True)
class Situation:
    """A run's facts beside its curves, for the advice.

    Attributes:
        run_dir: as typed in a command
        config: its config.yaml, resolved
        data: its data.json
        free_dirs: unused folders for the next runs, one for each advice
        num_processes: of the run
        tried: changes (`describe_change`) that brought no gain to this run's ancestors or their descendants
        forgetting: change on general prompts; None if not measured
        past: flat configs of all runs on the same base and rows, this one included
    """

    run_dir: str
    config: Mapping[str, Any]
    data: Mapping[str, Any]
    free_dirs: Sequence[str]
    num_processes: int = 1
    tried: frozenset[frozenset[tuple[str, str]]] = frozenset()
    past: Sequence[Mapping[str, Any]] = ()
    forgetting: Forgetting | None = None


@dataclass(frozen=True)
class _Step:
    changes: dict[str, Any]
    reason: str
    section: str
    first: str = ""  # command to run before it


def advise(verdict: Verdict, curves: Curves, situation: Situation) -> list[Advice]:
    """Return the guide's next steps, most effective first, each changing as little as possible.

    Changes tried without gain and configs already run are left out.
    """
    if verdict.label == OVERFITTING:
        steps = [*_loosen(curves, situation.config), *_retain(situation, only_rows=True)]
    elif verdict.label == UNDERFITTING:
        steps = _tighten(verdict, situation)
    elif verdict.label == GOOD_FIT:
        steps = _retain(situation)
    else:
        steps = _clear_up(verdict, curves, situation)
    steps = [step for step in (_avoid_past(step, situation) for step in steps) if step is not None]
    advice = [
        Advice(
            step.first + _write_command(step.changes, situation, output_dir), step.changes, step.reason, step.section
        )
        for step, output_dir in zip(steps, situation.free_dirs, strict=False)
    ]
    if verdict.label == GOOD_FIT:
        stop = _advise_export(situation, "the fit is good: stop here and export")
        return [stop, *advice, *_advise_larger_model(situation, situation.free_dirs[len(advice)])]
    if verdict.label == OVERFITTING:
        best = f"the export takes best/, the adapter of step {curves.best.step}, before the rise"
        return [*advice, _advise_export(situation, best)]
    if not advice:
        tried = "all of the guide's adjustments were tried without gain; add rows, or export this run"
        return [_advise_export(situation, tried)]
    return advice


def describe_change(before: Mapping[str, Any], after: Mapping[str, Any]) -> frozenset[tuple[str, str]]:
    """Return which of FIT_KEYS differ between two flat configs, each with its direction: up, down, or the new value."""
    keys = [key for key in FIT_KEYS if before.get(key) != after.get(key)]
    return frozenset((key, _find_direction(before.get(key), after.get(key))) for key in keys)


def _find_direction(before: Any, after: Any) -> str:
    if isinstance(before, (int, float)) and isinstance(after, (int, float)):
        return "up" if after > before else "down"
    return f"to {after}"


def _loosen(curves: Curves, config: Mapping[str, Any]) -> Iterator[_Step]:
    """Yield the adjustments against overfitting."""
    per_epoch = max(1, sum(step.epoch == 0 for step in curves.training))
    best_epoch = max(1, math.ceil(curves.best.step / per_epoch))
    if best_epoch < config["epochs"]:
        changes, num_steps = {"epochs": best_epoch}, best_epoch * per_epoch
        if config["warmup_steps"] > num_steps:
            changes["warmup_steps"] = num_steps // 10
        seen = f"the validation loss was lowest at step {curves.best.step}, in epoch {best_epoch} of {config['epochs']}"
        yield _Step(changes, f"{seen}; fewer passes over the rows leave less to memorize", EPOCHS)
    rate = config["learning_rate"]
    yield _Step({"learning_rate": rate / 2}, "slower learning keeps the model from becoming too rigid", LEARNING_RATE)
    ratio = config["lora_alpha"] / config["lora_rank"]
    if ratio > 1:
        reason = f"a ratio of alpha to rank of {ratio:g} works like a higher rate; 1 is generally recommended"
        yield _Step({"lora_alpha": config["lora_rank"]}, reason, ADDITIONAL)
    yield from _step_along("lora_dropout", config, DROPOUTS, up=True, why="more dropout is the guide's answer")
    yield from _step_along("weight_decay", config, WEIGHT_DECAYS, up=True, why="smaller weights generalize better")


def _tighten(verdict: Verdict, situation: Situation) -> Iterator[_Step]:
    """Yield the adjustments against underfitting."""
    config, data = situation.config, situation.data
    if config.get("max_steps_per_epoch") is not None:
        reason = f"an epoch ended after {config['max_steps_per_epoch']} steps; null lets it see every row"
        yield _Step({"max_steps_per_epoch": None}, reason, EPOCHS)
    rate, further = config["learning_rate"], verdict.figures.get("further_gain", 0.0)
    times, reason = 2, "more passes over the rows, for deeper learning"
    if further > FAR_FROM_FLAT:
        times, reason = 4, f"{reason}; four times as many, as twice would bring about {further:.0%} more"
    longer = _Step({"epochs": times * config["epochs"]}, reason, EPOCHS)
    if rate < STARTING_RATE:
        start = format_value(STARTING_RATE)
        reason = f"{format_value(rate)} is below {start}, the guide's starting point, and a higher rate takes no longer"
        yield _Step({"learning_rate": STARTING_RATE}, reason, LEARNING_RATE)
        yield longer
    else:
        yield longer
        reason = "a higher rate learns more from the same steps"
        yield _Step({"learning_rate": 2 * rate}, reason, LEARNING_RATE)
    yield from _step_along("lora_dropout", config, DROPOUTS, up=False, why="less dropout lets more be learned")
    yield from _step_along("weight_decay", config, WEIGHT_DECAYS, up=False, why="a weaker pull to small weights")
    rank, alpha = config["lora_rank"], config["lora_alpha"]
    wider = "a higher rank captures more and costs memory; alpha with it, so that their ratio stays"
    yield _Step({"lora_rank": 2 * rank, "lora_alpha": 2 * alpha}, wider, ADDITIONAL)
    if alpha / rank < 2:
        stronger = f"a ratio of alpha to rank of 2 instead of {alpha / rank:g} gives the adapter more weight"
        yield _Step({"lora_alpha": 2 * rank}, stronger, ADDITIONAL)
    longest = max((row.get("tokens", 0) for row in data.get("rows_truncated", ())), default=0)
    if longest > config["max_seq_len"]:
        cut = f"{len(data['rows_truncated'])} rows were cut; the longest has {longest} tokens"
        yield _Step({"max_seq_len": longest}, cut, ADDITIONAL)


def _retain(situation: Situation, *, only_rows: bool = False) -> Iterator[_Step]:
    """Yield changes that keep more of the base, if the run has significantly moved from it."""
    config, forgetting = situation.config, situation.forgetting
    if forgetting is None or forgetting.divergence.low < NOTABLE_DIVERGENCE:
        return
    lost = f"the run forgot some of the base (KL {forgetting.divergence.value:.2f} on general prompts)"
    changes = _mix_general_rows(situation)
    if changes:
        share = GENERAL_SHARE / (1 + GENERAL_SHARE)
        reason = f"{lost}; mix in the base's own answers to other general prompts, {share:.0%} of the rows"
        make_rows = format_script("make_general_rows", Path(situation.run_dir))
        yield _Step(changes, reason, ITERATING, f"{make_rows} && ")
    if only_rows:
        return
    yield _Step({"learning_rate": config["learning_rate"] / 2}, f"{lost}; a lower rate moves it less", LEARNING_RATE)
    if config["epochs"] > 1:
        yield _Step({"epochs": config["epochs"] - 1}, f"{lost}; fewer passes move it less", EPOCHS)


def _mix_general_rows(situation: Situation) -> dict[str, Any]:
    """Return the changes that add general rows as one more source; none if they are there already."""
    dataset, path = situation.config["dataset"], str(Path(situation.run_dir, GENERAL_FILE))
    sources, changes = dataset.get("sources"), {}
    if sources is None:
        own = {key: dataset[key] for key in ("files", "validation_files") if dataset.get(key) is not None}
        sources, changes = [own], {f"dataset.{key}": None for key in own}
    if any(Path(name).name == GENERAL_FILE for source in sources for name in _list_files(source["files"])):
        return {}
    rows = min(MAX_GENERAL_ROWS, math.ceil(GENERAL_SHARE * situation.data["training"]["rows"]))
    general = {"files": [path], "format": "openai", "validation_split": 0, "rows": rows}
    return {**changes, "dataset.sources": [*sources, general]}


def _list_files(files: str | Sequence[str]) -> list[str]:
    return [files] if isinstance(files, str) else [*files]


def _clear_up(verdict: Verdict, curves: Curves, situation: Situation) -> Iterator[_Step]:
    """Yield changes with which the next run can be judged."""
    config, figures = situation.config, verdict.figures
    if figures.get("diverged"):
        reason = "the run diverged; a lower rate is gradual and stable"
        yield _Step({"learning_rate": config["learning_rate"] / 2}, reason, LEARNING_RATE)
    elif not curves.validations:
        reason = "fit cannot be judged without validation rows; this holds out a tenth"
        yield _Step({"dataset.validation_split": 0.1}, reason, ITERATING)
    elif "rows_needed" in figures:
        yield from _ask_for_rows(int(figures["rows_needed"]), curves, situation)
    elif len(curves.trained) < 3:
        steps = max((step.step for step in curves.training), default=1)
        reason = "the curve needs more points to show its shape"
        yield _Step({"eval_every_n_steps": max(1, math.ceil(steps / 10))}, reason, ITERATING)
    else:
        yield _Step({}, "the run recorded too little to be judged; run it again with this version", ITERATING)


def _ask_for_rows(needed: int, curves: Curves, situation: Situation) -> Iterator[_Step]:
    data, dataset = situation.data, situation.config["dataset"]
    measured, num_validation_rows = curves.final.rows, data["validation"]["rows"]
    if measured < num_validation_rows:
        rows = min(needed, num_validation_rows)
        reason = (
            f"only {measured} of {num_validation_rows} validation rows were measured; about {needed} would decide it"
        )
        yield _Step({"max_val_rows": rows}, reason, ITERATING)
    if needed <= num_validation_rows:
        return
    total = data["training"]["rows"] + num_validation_rows
    share = min(0.5, math.ceil(100 * needed / total) / 100)
    reason = f"{num_validation_rows} validation rows; about {needed} would decide it, {share:.3g} of all {total}"
    if share * total < needed:
        reason += ", more than there are: add rows"
    changes: dict[str, Any] = {"dataset.validation_split": share}
    if dataset.get("sources") is not None:
        changes = {"dataset.sources": [_hold_out(source, share) for source in dataset["sources"]]}
    elif dataset.get("validation_files") is not None:
        files = [dataset["files"], dataset["validation_files"]]
        both = [name for one in files for name in _list_files(one)]
        changes = {"dataset.files": both, "dataset.validation_files": None, **changes}
    if situation.config.get("max_val_rows") is not None:
        changes["max_val_rows"] = needed
    yield _Step(changes, reason, ITERATING)


def _hold_out(source: Mapping[str, Any], share: float) -> dict[str, Any]:
    """Return the source with a share of all its rows held out."""
    given = [source["files"], source.get("validation_files") or []]
    both = [name for one in given for name in _list_files(one)]
    rest = {key: value for key, value in source.items() if key not in ("files", "validation_files")}
    return {"files": both, **rest, "validation_split": share}


def _step_along(key: str, config: Mapping[str, Any], values: Iterable[float], *, up: bool, why: str) -> Iterator[_Step]:
    """Yield the change to the guide's next value, where there is one."""
    now = config[key]
    beyond = [value for value in values if (value > now if up else value < now)]
    if beyond:
        yield _Step({key: min(beyond) if up else max(beyond)}, why, ADDITIONAL)


def _avoid_past(step: _Step, situation: Situation) -> _Step | None:
    """Return the step if it is new, the rate halfway if its end was run already, None if it was tried in vain."""
    change = describe_change(situation.config, {**situation.config, **step.changes})
    if change and change in situation.tried:
        return None
    if not step.changes or not _was_run(step.changes, situation):
        return step
    if set(step.changes) != {"learning_rate"}:
        return None
    then = step.changes["learning_rate"]
    halfway = {"learning_rate": float(f"{math.sqrt(situation.config['learning_rate'] * then):.2e}")}
    if _was_run(halfway, situation):
        return None
    reason = f"{step.reason}; {format_value(then)} was run already, and this is halfway"
    return replace(step, changes=halfway, reason=reason)


def _was_run(changes: Mapping[str, Any], situation: Situation) -> bool:
    if not set(changes) <= set(FIT_KEYS):
        return False
    wanted = {key: situation.config.get(key) for key in FIT_KEYS} | changes
    return any(all(_are_equal(run.get(key), wanted[key]) for key in FIT_KEYS) for run in situation.past)


def _are_equal(first: Any, second: Any) -> bool:
    if isinstance(first, (int, float)) and isinstance(second, (int, float)):
        return math.isclose(first, second, rel_tol=0.02)
    return first == second


def _advise_export(situation: Situation, reason: str) -> Advice:
    return Advice(format_script("export", Path(situation.run_dir)), {}, reason, ITERATING)


def _advise_larger_model(situation: Situation, output_dir: str) -> Iterator[Advice]:
    """Yield the run of the next larger model on the same rows, with its own guide values."""
    config = situation.config
    larger = LARGER.get(config["model"].get("architecture"))
    if larger is None:
        return
    path = Path(f"configs/{larger}/{'qlora' if config['base_weights'] == 'nf4' else 'lora'}.yaml")
    dataset = {f"dataset.{key}": value for key, value in config["dataset"].items() if key != "_component_"}
    # The YAML's split would take more rows beside the validation files.
    changes = {"dataset.validation_split": None} if dataset.get("dataset.validation_files") else {}
    changes |= {"dataset.files": None} if dataset.get("dataset.sources") else {}
    changes |= dataset | {key: config[key] for key in ("max_seq_len", "seed", "device")}
    train = _write_run(path, {**changes, "output_dir": output_dir}, situation.num_processes)
    reason = f"if its answers are not good enough: the next larger model, {larger}, at its own rate"
    download = format_script("download", "--config", path)
    yield Advice(f"{download} && {train}", changes, reason, CHOOSING)


def _write_command(changes: Mapping[str, Any], situation: Situation, output_dir: str) -> str:
    """Return the run's command with its changes. config.yaml keeps references, so one flat key changes all uses."""
    own = {"output_dir": output_dir, "parent_run": situation.run_dir, "resume": False}
    return _write_run(Path(situation.run_dir, "config.yaml"), {**changes, **own}, situation.num_processes)


def _write_run(config_path: Path, overrides: Mapping[str, Any], num_processes: int) -> str:
    return format_run("--config", config_path, *format_overrides(overrides), num_processes=num_processes)
