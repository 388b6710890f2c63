"""Go on with a run: where it stood, what must be the same, and what to say where it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tune2gguf.base.digest import digest_base
from tune2gguf.commands import format_command, format_overrides
from tune2gguf.data import PreparedData
from tune2gguf.distributed.signals import StopRequested
from tune2gguf.distributed.world import AgreedError, World, describe_error, gather_over_ranks
from tune2gguf.files.atomic import clear_leftovers
from tune2gguf.files.digest import digest_file
from tune2gguf.files.records import make_record
from tune2gguf.model.architectures import Architecture
from tune2gguf.model.llama import CausalLM
from tune2gguf.runs.adapter import ADAPTER_WEIGHTS, from_peft_layout, restore_adapter, save_adapter
from tune2gguf.runs.checkpoints import (
    CHECKPOINTS,
    Checkpoint,
    CheckpointWriter,
    get_step,
    list_checkpoints,
    read_checkpoint,
    remove_checkpoint,
)
from tune2gguf.runs.config_file import ADDED_KEYS, flatten_config, rename_components
from tune2gguf.runs.environment import read_environment, record_resume
from tune2gguf.runs.files import PLAN_FILE, JsonLinesFile
from tune2gguf.runs.folder import create_run_folder, find_free_folder, write_rows, write_start
from tune2gguf.runs.plan import LAYOUT_KEYS, read_plan
from tune2gguf.train.progress import Progress
from tune2gguf.train.record import NOTHING_RECORDED, RunRecord
from tune2gguf.train.seeds import restore_random_state
from tune2gguf.train.steps import advance_schedule, restore_optimizer

# Where things are may be another place on each machine of a run; the rest of the config is the same on all.
OWN_KEYS = {
    "output_dir",
    "parent_run",
    "resume",
    "base_dir",
    "model.base_dir",
    "tokenizer.base_dir",
    "dataset.files",
    "dataset.validation_files",
    "dataset.sources",
}
# Neither the weights nor the metrics of a step depend on these, nor on what is below them; the base and the rows are
# compared by their content. early_stopping_patience decides, as epochs does, how many steps there are.
FREE_KEYS = OWN_KEYS | {
    "early_stopping_patience",
    "score_general_prompts",
    "metric_logger",
    "save_every_n_steps",
    "keep_last",
    "on_nonfinite",
    "parallel",
    "base_source",
}


def describe_run(cfg: DictConfig, data_fingerprint: str, *, parallel: str, world: World) -> dict[str, Any]:
    """Return what decides a run's result: its config, flat, and what base, rows and processes it has."""
    return {
        "config": _flatten_without(FREE_KEYS, cfg),
        # One process a machine reads the whole base for this.
        "base": digest_base(cfg.base_dir) if world.local_rank == 0 else None,
        "data": data_fingerprint,
        "processes": world.size,
        "parallel": parallel if world.size > 1 else "replicate",
    }


def check_machines(cfg: DictConfig, run: Mapping[str, Any]) -> None:
    """Make sure that all machines of a run were given the same; every process has to ask.

    Args:
        run: from describe_run

    Raises:
        AgreedError: if arguments, base or rows of a machine are not those of the first, with what differs
    """
    here = {"base": run["base"], "data": run["data"], "config": _flatten_without(OWN_KEYS, cfg)}
    first, *others = gather_over_ranks(here)
    for rank, other in enumerate(others, start=1):
        before, now = first["config"], other["config"]
        differences = [
            f"{key}: {before.get(key)} in process 0, {now.get(key)} in process {rank}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        if other["base"] not in (None, first["base"]):
            differences.append("the base model: its files are not the same")
        if other["data"] != first["data"]:
            differences.append("the data: the rows are not the same")
        if differences:
            raise AgreedError(
                f"process {rank} is on a machine with something else than process 0; what differs:\n  "
                + "\n  ".join(differences)
            )


def _flatten_without(left_out: set[str], cfg: DictConfig) -> dict[str, Any]:
    return {
        key: value
        for key, value in flatten_config(OmegaConf.to_container(cfg, resolve=True)).items()
        if not any(key == name or key.startswith(f"{name}.") for name in left_out)
    }


def find_differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return why the run of a checkpoint is not this one; more epochs are no reason."""
    differences, added = [], {key: value for key, value in ADDED_KEYS.items() if key not in FREE_KEYS}
    config = added | rename_components(saved["config"])
    for key in sorted(config.keys() | now["config"].keys()):
        before, after = config.get(key), now["config"].get(key)
        if key == "epochs" and after > before:
            continue
        if before != after:
            only_raised = " (it may only be raised)" if key == "epochs" else ""
            differences.append(f"{key}: {before} in the checkpoint, {after} now{only_raised}")
    if saved["base"] != now["base"]:
        differences.append("the base model: its files are not those that the run was started with")
    if saved["data"] != now["data"]:
        differences.append("the data: the rows are not those that the run was started with")
    for key, what in (("processes", "the number of processes"), ("parallel", "parallel")):
        if saved[key] != now[key]:
            differences.append(f"{what}: {saved[key]} in the checkpoint, {now[key]} now")
    return differences


def open_checkpoint(resume: str | bool, output_dir: Path, run: Mapping[str, Any]) -> Checkpoint | None:
    """Read the checkpoint to go on from; None where there is none yet and the run starts from its beginning.

    Args:
        resume: auto for the newest, or a checkpoint folder
        run: from describe_run

    Raises:
        ValueError: if the checkpoint is damaged, or is that of another run
    """
    if resume is False:
        return None
    if resume == "auto":
        checkpoints = list_checkpoints(output_dir / CHECKPOINTS)
        if not checkpoints:
            return None
        folder = checkpoints[-1]
    else:
        folder = Path(resume)
    checkpoint = read_checkpoint(folder)
    differences = find_differences(checkpoint.progress["run"], run)
    if "tokens_per_pass" not in checkpoint.progress["run"]["config"] and checkpoint.progress["step_in_epoch"]:
        differences.append(
            "the order of the rows: an earlier tune2gguf chose it; its runs can go on from an epoch's end only"
        )
    if differences:
        own = {"resume": False, "output_dir": find_free_folder(output_dir)}
        raise ValueError(
            f"{folder} is a checkpoint of another run than this one; what differs:\n  "
            + "\n  ".join(differences)
            + f"\nStart a run of its own: {format_command(*format_overrides(own))}"
        )
    return checkpoint


def read_layout(resume: str | bool, output_dir: Path) -> dict[str, Any]:
    """Return how the rows of a run's steps went through the model before it goes on; empty where it begins."""
    if resume is False or not (output_dir / PLAN_FILE).is_file():
        return {}
    try:
        plan = read_plan(output_dir)
    except ValueError as error:
        print(f"resume: {error}; how rows share passes is chosen anew, so that the last bits may differ")
        return {}
    return {key: plan[key] for key in LAYOUT_KEYS if key in plan}


def restore_run(
    checkpoint: Checkpoint | None,
    model: CausalLM,
    *,
    architecture: Architecture,
    optimizer: Optimizer,
    schedule: LRScheduler,
    world: World,
) -> Progress:
    """Bring adapter, optimizer, schedule and random numbers to where the checkpoint has them; return where that is.

    Without a checkpoint a run stands at its beginning, where all of them are.
    """
    if checkpoint is None:
        return Progress()
    progress = make_record(Progress, checkpoint.progress)
    restore_adapter(model, from_peft_layout(checkpoint.adapter, architecture))
    restore_optimizer(optimizer, checkpoint.state["optimizer"])
    advance_schedule(schedule, progress.step)
    restore_random_state(checkpoint.state["random"][world.rank], world.device)
    return progress


@contextmanager
def enter_run_folder(
    checkpoint: Checkpoint | None, progress: Progress, cfg: DictConfig, *, data: PreparedData, device: str
) -> Iterator[Path]:
    """Yield the run folder as it was at the checkpoint, or a new one, which takes its name when the block ends.

    `progress` learns whether best/ is lost.

    Raises:
        ValueError: if the folder exists and is not to be resumed, or its metrics or samples are lost
    """
    folder = Path(cfg.output_dir)
    if cfg.resume is False or not folder.exists():
        with create_run_folder(cfg, data=data, device=device) as unfinished:
            yield unfinished
        return
    read_environment(folder)  # a folder of something else, or of a newer version, stays as it is
    if checkpoint is None:
        _rewind(folder, step=0, sizes=NOTHING_RECORDED)
        write_start(folder, cfg, data=data, device=device)
        print(f"resume: {folder} has no checkpoint yet; starting from the beginning")
    else:
        _rewind(folder, step=progress.step, sizes=checkpoint.progress["recorded_bytes"])
        _restore_best(folder, checkpoint, progress)
        print(f"resume: going on after step {progress.step}, in epoch {progress.epoch + 1}")
        before = checkpoint.progress["run"]["config"]["epochs"]
        if before != cfg.epochs:
            print(
                f"resume: {before} epochs have become {cfg.epochs}; the learning rate now follows the longer schedule"
            )
        write_rows(folder, cfg, data=data)  # they are the same, but an earlier version recorded less of them
        changes = record_resume(folder, step=progress.step, device=device)
        if changes:
            print(f"resume: the last bits may differ from a run that was never stopped: {'; '.join(changes)}")
    yield folder


def _rewind(output_dir: Path, *, step: int, sizes: Mapping[str, int]) -> None:
    checkpoints_dir = output_dir / CHECKPOINTS
    checkpoints_dir.mkdir(exist_ok=True)
    for folder in (output_dir, checkpoints_dir, output_dir / "best", output_dir / "last"):
        clear_leftovers(folder)
    # The newest first, and the lines that they need last: killed in between, the rest can still be gone on from.
    for folder in reversed(list_checkpoints(checkpoints_dir)):
        if get_step(folder) > step:
            remove_checkpoint(folder)
            print(f"resume: removed {folder}, which this run comes to again")
    for name, num_bytes in sizes.items():
        JsonLinesFile(output_dir / name).cut(num_bytes)


def _restore_best(output_dir: Path, checkpoint: Checkpoint, progress: Progress) -> None:
    """Make best/ what it was; where it has gone on since and cannot be had back, the next validation is the best."""
    if progress.best_step is None:
        return
    weights = output_dir / "best" / ADAPTER_WEIGHTS
    if progress.best_step == progress.step:
        save_adapter(output_dir / "best", checkpoint.adapter, checkpoint.adapter_config)
    elif not weights.is_file() or digest_file(weights) != progress.best_sha256:
        print(f"resume: best/ is not the adapter of step {progress.best_step} any more; the search for the best is new")
        progress.best_loss = progress.best_step = progress.best_sha256 = None
        progress.validations_without_best = 0


@contextmanager
def save_when_stopped(
    save: Callable[[], None], writer: CheckpointWriter | None, record: RunRecord | None
) -> Iterator[None]:
    """Save the run when the block is left before its end for a reason that every process has, and say how to go on.

    Args:
        save: begins to write a checkpoint; every process takes part
        writer, record: of the main process, closed at the end of the block

    Raises:
        ValueError: for a disk that could not be written to, with what is intact and the way on
    """
    try:
        yield
        if writer is not None:
            writer.wait()
    except (StopRequested, AgreedError):
        save()
        if writer is not None:
            writer.wait()
            print(f"saved {writer.newest}; to go on from there: the same command with resume=auto")
        raise
    except OSError as error:
        raise ValueError(
            f"{describe_error(error)}. The checkpoints before this are intact; "
            "when it is mended, go on with the same command and resume=auto"
        ) from error
    finally:
        for opened in filter(None, (writer, record)):
            opened.close()
