"""Search the config: each trial is a run of its own, ranked by validation loss; what is hopeless is stopped on the way.

Optuna keeps the trials in the sweep's folder (SQLite), queues them and prunes; the runs are ordinary run folders
beside that file. A sweep that was killed goes on where it was: finished trials are not repeated, an interrupted one is
resumed.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tune2gguf.files.atomic import write_text
from tune2gguf.runs.curves import METRICS_FILE, read_curves

if TYPE_CHECKING:
    import optuna

STUDY_FILE, DEFINITION_FILE = "sweep.db", "sweep.json"
SAMPLERS = ("grid", "tpe")
# The guide's own suggestions (its section 5); alpha follows from the ratio to the rank.
GUIDE_SPACE = {
    "learning_rate": ("5.0e-5", "1.0e-4", "2.0e-4"),
    "lora_dropout": ("0.1", "0.2"),
    "weight_decay": ("0.01", "0.1", "0.001", "0"),
}
GUIDE_RATIOS = (1.0, 2.0, 0.5)
# Trials that have to be finished, and validations of a trial that have to be made, before one is stopped early.
PRUNE_AFTER_TRIALS, PRUNE_AFTER_VALIDATIONS = 4, 3
MAX_CHECKED = 2000
_POLL_SECONDS = 0.5


class SweepStopped(Exception):
    """The sweep was asked to stop by a signal; the run at work has saved itself."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


@dataclass(frozen=True)
class Sweep:
    """What is searched.

    Attributes:
        folder: of the sweep; the trials' run folders are in it
        fixed: overrides that all trials share, as key=value
        space: key -> values, as text
        num_trials: None is all combinations
    """

    folder: Path
    config_path: Path
    fixed: tuple[str, ...]
    space: Mapping[str, tuple[str, ...]]
    sampler: str = "grid"
    num_trials: int | None = None
    is_pruning: bool = True
    seed: int = 0

    def list_combinations(self) -> list[dict[str, str]]:
        """Return all combinations of values, in the order in which their trials are numbered."""
        return [dict(zip(self.space, values, strict=True)) for values in itertools.product(*self.space.values())]

    def count_trials(self) -> int:
        num_combinations = len(self.list_combinations())
        return num_combinations if self.num_trials is None else min(self.num_trials, num_combinations)


def parse_overrides(overrides: Sequence[str]) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Part overrides into fixed ones and key=value,value,…; a list in brackets is one value.

    Raises:
        ValueError: if one is not key=value, is searched and given twice, or is the sweep's own
    """
    fixed, space = [], {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not (key and equals):
            raise ValueError(f"overrides are written key=value or key=value,value,…; got {override!r}")
        if key in ("output_dir", "resume"):
            raise ValueError(f"{key} is set by the sweep for each trial; --out names the sweep's folder")
        if "," not in value or value.startswith("["):
            fixed.append(override)
            continue
        values = tuple(part.strip() for part in value.split(","))
        if not all(values) or len(set(values)) < len(values):
            raise ValueError(f"{override}: each value once, and none empty")
        if key in space:
            raise ValueError(f"{key} is given twice")
        space[key] = values
    twice = sorted(space.keys() & {override.partition("=")[0] for override in fixed})
    if twice:
        raise ValueError(f"{', '.join(twice)}: given as one value and as several")
    return tuple(fixed), space


def add_guide_space(config_path: Path, fixed: Sequence[str], space: Mapping[str, tuple[str, ...]]) -> dict:
    """Return the space with the guide's values for the keys that are neither given nor searched.

    Raises:
        ValueError: if the config cannot be read
    """
    from tune2gguf.config import read_config

    config = read_config(config_path, list(fixed))
    given = {override.partition("=")[0] for override in fixed}
    guide = dict(GUIDE_SPACE)
    if "lora_rank" not in space:
        guide["lora_alpha"] = tuple(f"{config.lora_rank * ratio:g}" for ratio in GUIDE_RATIOS)
    return {**{key: values for key, values in guide.items() if key not in given}, **space}


def check_sweep(sweep: Sweep) -> None:
    """Check every combination as the recipe would, before anything runs.

    Raises:
        ValueError: with every problem and the combination that has it
    """
    from tune2gguf.config import check_config, read_config

    if not sweep.space:
        raise ValueError("nothing to search: give a key several values (learning_rate=5e-5,1e-4), or --guide")
    combinations = sweep.list_combinations()
    if len(combinations) > MAX_CHECKED:
        raise ValueError(f"{len(combinations)} combinations are too many to search; at most {MAX_CHECKED}")
    problems: dict[str, str] = {}
    for number, combination in enumerate(combinations):
        config = read_config(sweep.config_path, list_overrides(sweep, number))
        try:
            check_config(config)
        except ValueError as error:
            described = " ".join(f"{key}={value}" for key, value in combination.items())
            problems.setdefault(str(error), described)
    if problems:
        raise ValueError("\n".join(f"{where}: {problem}" for problem, where in problems.items()))
    dataset = read_config(sweep.config_path, list_overrides(sweep, 0)).dataset
    if not (dataset.get("validation_files") or dataset.get("validation_split")):
        raise ValueError("a sweep ranks by validation loss; hold rows out with dataset.validation_split=0.1")


def list_overrides(sweep: Sweep, number: int) -> list[str]:
    """Return all overrides of a trial's run; it goes on where it stopped."""
    searched = [f"{key}={value}" for key, value in sweep.list_combinations()[number].items()]
    return [*sweep.fixed, *searched, f"output_dir={get_trial_dir(sweep, number)}", "resume=auto"]


def get_trial_dir(sweep: Sweep, number: int) -> Path:
    return sweep.folder / f"trial-{number:03}"


def run_sweep(sweep: Sweep) -> list[Path]:
    """Run what is left of a sweep; return the run folders of its trials, also of those that were stopped early.

    Raises:
        ValueError: if a combination is wrong, the folder is that of another sweep or in use, no trial succeeds, or
            Optuna is not installed
        SweepStopped: on SIGTERM or Ctrl-C, when the running trial has saved itself
    """
    from filelock import FileLock, Timeout

    optuna = _import_optuna()
    check_sweep(sweep)
    sweep.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(sweep.folder / ".sweep.lock", timeout=0):
            _claim_folder(sweep)
            study = _open_study(optuna, sweep)
            _run_trials(optuna, study, sweep)
    except Timeout:
        raise ValueError(f"{sweep.folder}: another sweep is at work here") from None
    folders = [get_trial_dir(sweep, number) for number in range(len(sweep.list_combinations()))]
    found = [folder for folder in folders if (folder / METRICS_FILE).is_file()]
    if not found:
        raise ValueError(f"{sweep.folder}: no trial succeeded; see the logs there")
    return found


def _import_optuna():
    try:
        import optuna
    except ModuleNotFoundError:
        raise ValueError('a sweep needs Optuna: pip install "tune2gguf[sweep]", or pip install optuna') from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _claim_folder(sweep: Sweep) -> None:
    """Write down what is searched, or compare it with what is written there already."""
    definition = {
        "config": str(sweep.config_path),
        "fixed": list(sweep.fixed),
        "space": {key: list(values) for key, values in sweep.space.items()},
    }
    path = sweep.folder / DEFINITION_FILE
    if not path.is_file():
        write_text(path, json.dumps(definition, indent=2) + "\n")
        return
    saved = json.loads(path.read_text(encoding="utf-8"))
    differing = [key for key in definition if definition[key] != saved.get(key)]
    if differing:
        what = "\n  ".join(f"{key}: {saved.get(key)} there, {definition[key]} now" for key in differing)
        raise ValueError(f"{sweep.folder} is the folder of another sweep; what differs:\n  {what}\nGive another --out")


def _open_study(optuna, sweep: Sweep) -> optuna.Study:
    pruner = optuna.pruners.NopPruner()
    if sweep.is_pruning:
        pruner = optuna.pruners.MedianPruner(PRUNE_AFTER_TRIALS, PRUNE_AFTER_VALIDATIONS)
    study = optuna.create_study(
        storage=f"sqlite:///{(sweep.folder / STUDY_FILE).resolve()}",
        study_name="sweep",
        direction="minimize",
        pruner=pruner,
        load_if_exists=True,
    )
    # A sampler that begins again with the same seed would propose what it proposed before.
    study.sampler = optuna.samplers.TPESampler(seed=sweep.seed + len(study.trials))
    return study


def _take_interrupted(optuna, study: optuna.Study, sweep: Sweep) -> list[dict[str, str]]:
    """Return the combinations that a killed sweep left running; their trials are closed."""
    states = optuna.trial.TrialState
    interrupted = []
    for trial in study.get_trials(states=(states.RUNNING,)):
        study.tell(trial.number, state=states.FAIL)
        if trial.params.keys() == sweep.space.keys():
            print(f"trial {_find_number(sweep, trial.params):03} was interrupted; it goes on where it stopped")
            interrupted.append(trial.params)
    return interrupted


def _run_trials(optuna, study: optuna.Study, sweep: Sweep) -> None:
    states, combinations = optuna.trial.TrialState, sweep.list_combinations()
    interrupted = _take_interrupted(optuna, study, sweep)
    ended = study.get_trials(states=(states.COMPLETE, states.PRUNED))
    done = {_find_number(sweep, trial.params) for trial in ended}
    while len(done) < sweep.count_trials():
        left = [combination for number, combination in enumerate(combinations) if number not in done]
        if interrupted:
            study.enqueue_trial(interrupted.pop())
        elif sweep.sampler == "grid":
            study.enqueue_trial(left[0])
        trial = study.ask()
        params = {key: trial.suggest_categorical(key, values) for key, values in sweep.space.items()}
        if params not in left:
            # The same run would end the same: instead of it the first that is left is run.
            study.tell(trial, state=states.FAIL)
            study.enqueue_trial(left[0])
            continue
        number = _find_number(sweep, params)
        described = " ".join(f"{key}={value}" for key, value in params.items())
        print(f"trial {number:03}, {len(done) + 1} of {sweep.count_trials()}: {described}", flush=True)
        _run_trial(optuna, study, trial, sweep, number)
        done.add(number)


def _find_number(sweep: Sweep, params: Mapping[str, str]) -> int:
    return sweep.list_combinations().index({key: params[key] for key in sweep.space})


def _run_trial(optuna, study: optuna.Study, trial: optuna.Trial, sweep: Sweep, number: int) -> None:
    """Run a trial in a process of its own, stopping it where the others were better at its point."""
    states = optuna.trial.TrialState
    folder = get_trial_dir(sweep, number)
    reported = 0
    with _start_run(sweep, number) as process:
        while process.poll() is None:
            time.sleep(_POLL_SECONDS)
            losses = _read_losses(folder)
            for position in range(reported, len(losses)):
                trial.report(losses[position], position + 1)
            reported = len(losses)
            if reported > PRUNE_AFTER_VALIDATIONS and process.poll() is None and trial.should_prune():
                process.send_signal(signal.SIGTERM)
                process.wait()
                print(f"  stopped at validation loss {losses[-1]:.4f}: half of the trials were better by then")
                study.tell(trial, state=states.PRUNED)
                return
    losses = _read_losses(folder)
    if process.returncode != 0 or not losses:
        print(f"  failed with exit code {process.returncode}: {_read_last_line(folder)}; {_get_log(folder)} has more")
        study.tell(trial, state=states.FAIL)
        return
    for position in range(reported, len(losses)):
        trial.report(losses[position], position + 1)
    study.tell(trial, min(losses))
    print(f"  validation loss {min(losses):.4f}")


def _read_losses(folder: Path) -> list[float]:
    """Return the validation losses after a step so far."""
    if not (folder / METRICS_FILE).is_file():
        return []
    return [one.loss for one in read_curves(folder).trained]


@contextmanager
def _start_run(sweep: Sweep, number: int) -> Iterator[subprocess.Popen]:
    """Start the run of a trial; whatever ends this process in good order ends it as well, saved.

    The run inherits a lock and holds it as long as it lives: after a sweep that was killed outright the next one waits
    for the run that is left, instead of starting another in its folder.
    """
    folder = get_trial_dir(sweep, number)
    command = [_find_tune(), "run", "recipes/lora_finetune.py", "--config", str(sweep.config_path)]
    command += list_overrides(sweep, number)
    with folder.with_suffix(".lock").open("w") as lock, _get_log(folder).open("a", encoding="utf-8") as log:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"  its run from before is still at work in {folder}; waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        # In a session of its own Ctrl-C reaches the run once, from here; a second signal would end it unsaved.
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, pass_fds=(lock.fileno(),), start_new_session=True
        )
        try:
            with _raise_on_signals():
                yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait()


@contextmanager
def _raise_on_signals() -> Iterator[None]:
    def stop(signum, frame):
        raise SweepStopped(signum)

    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _find_tune() -> str:
    beside = Path(sys.executable).parent / "tune"
    return str(beside) if beside.is_file() else "tune"


def _get_log(folder: Path) -> Path:
    return folder.with_suffix(".log")


def _read_last_line(folder: Path) -> str:
    lines = _get_log(folder).read_text(encoding="utf-8", errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    return said[-1].rpartition("\r")[2] if said else "it said nothing"


def describe_best(run_dirs: Sequence[Path]) -> list[str]:
    """Return the comparison of a sweep's runs, where its page is, and the command that exports the best."""
    from tune2gguf.report.compare import format_groups, group_runs, write_page

    groups = group_runs(run_dirs)
    page = write_page(groups, run_dirs[0].parent / "comparison.html")
    best = min((group.runs[0] for group in groups if group.num_rows), key=lambda run: run.curves.best.loss)
    command = f"python scripts/export.py {os.path.relpath(best.run_dir)}"
    return [format_groups(groups), f"page: {page}", f"best: {best.name}", f"next: {command}"]
