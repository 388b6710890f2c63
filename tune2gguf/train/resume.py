"""Resume: restore a run from a checkpoint, or report what differs from the run that wrote it."""

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

# Paths, which may differ between the machines of a run. The rest of the config may not.
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
# A resumed run may change these keys and their subkeys: no step's weights or metrics depend on them. Base and rows are
# compared by content. early_stopping_patience, like epochs, only changes the number of steps.
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
    """Return what determines a run's result: flat config, digests of base and rows, processes, parallel."""
    return {
        "config": _flatten_without(FREE_KEYS, cfg),
        # One process per machine reads the whole base.
        "base": digest_base(cfg.base_dir) if world.local_rank == 0 else None,
        "data": data_fingerprint,
        "processes": world.size,
        "parallel": parallel if world.size > 1 else "replicate",
    }


def check_machines(cfg: DictConfig, run: Mapping[str, Any]) -> None:
    """Check that all machines of a run have the same arguments, base and rows. Every process must call it.

    Args:
        run: from describe_run

    Raises:
        AgreedError: lists what differs between a machine and the first one
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
            differences.append("base model: the files differ")
        if other["data"] != first["data"]:
            differences.append("data: the rows differ")
        if differences:
            raise AgreedError(
                f"process {rank} differs from process 0; give every machine the same arguments, base and rows:\n  "
                + "\n  ".join(differences)
            )


def _flatten_without(left_out: set[str], cfg: DictConfig) -> dict[str, Any]:
    return {
        key: value
        for key, value in flatten_config(OmegaConf.to_container(cfg, resolve=True)).items()
        if not any(key == name or key.startswith(f"{name}.") for name in left_out)
    }


def find_differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the differences between a checkpoint's run and this one. More epochs are allowed."""
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
        differences.append("base model: the files differ from those at the start of the run")
    if saved["data"] != now["data"]:
        differences.append("data: the rows differ from those at the start of the run")
    for key, what in (("processes", "the number of processes"), ("parallel", "parallel")):
        if saved[key] != now[key]:
            differences.append(f"{what}: {saved[key]} in the checkpoint, {now[key]} now")
    return differences


def open_checkpoint(resume: str | bool, output_dir: Path, run: Mapping[str, Any]) -> Checkpoint | None:
    """Return the checkpoint to resume from, None if the run starts from the beginning.

    Args:
        resume: auto for the newest, or a checkpoint folder
        run: from describe_run

    Raises:
        ValueError: if the checkpoint is damaged or belongs to another run
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
            "row order: the checkpoint is from an earlier tune2gguf, whose runs resume only at the end of an epoch"
        )
    if differences:
        own = {"resume": False, "output_dir": find_free_folder(output_dir)}
        raise ValueError(
            f"{folder} belongs to another run; what differs:\n  "
            + "\n  ".join(differences)
            + f"\nStart a new run: {format_command(*format_overrides(own))}"
        )
    return checkpoint


def read_layout(resume: str | bool, output_dir: Path) -> dict[str, Any]:
    """Return the pass layout that a resumed run began with, {} for a new run."""
    if resume is False or not (output_dir / PLAN_FILE).is_file():
        return {}
    try:
        plan = read_plan(output_dir)
    except ValueError as error:
        print(f"resume: {error}; the split of rows into passes is chosen anew, so the last bits may differ")
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
    """Restore adapter, optimizer, schedule and random state from a checkpoint. Return its progress.

    Without a checkpoint, nothing is restored and the progress is that of a new run.
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
    """Yield the run folder, rewound to the checkpoint, or a new one, which gets its name when the block ends.

    If best/ cannot be restored, `progress` forgets it.

    Raises:
        ValueError: if the folder exists and must not be resumed, or its metrics or samples are lost
    """
    folder = Path(cfg.output_dir)
    if cfg.resume is False or not folder.exists():
        with create_run_folder(cfg, data=data, device=device) as unfinished:
            yield unfinished
        return
    read_environment(folder)  # refuses a folder of something else or of a newer version
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
            print(f"resume: epochs raised from {before} to {cfg.epochs}; the learning rate follows the longer schedule")
        write_rows(folder, cfg, data=data)  # the same rows, but an earlier version recorded less of them
        changes = record_resume(folder, step=progress.step, device=device)
        if changes:
            print(f"resume: the last bits may differ from an uninterrupted run: {'; '.join(changes)}")
    yield folder


def _rewind(output_dir: Path, *, step: int, sizes: Mapping[str, int]) -> None:
    checkpoints_dir = output_dir / CHECKPOINTS
    checkpoints_dir.mkdir(exist_ok=True)
    for folder in (output_dir, checkpoints_dir, output_dir / "best", output_dir / "last"):
        clear_leftovers(folder)
    # Checkpoints first, from the newest, then the lines: if killed in between, what is left can still be resumed.
    for folder in reversed(list_checkpoints(checkpoints_dir)):
        if get_step(folder) > step:
            remove_checkpoint(folder)
            print(f"resume: removed {folder}; the run will write it again")
    for name, num_bytes in sizes.items():
        JsonLinesFile(output_dir / name).cut(num_bytes)


def _restore_best(output_dir: Path, checkpoint: Checkpoint, progress: Progress) -> None:
    """Restore best/. If it was overwritten since, restart the search."""
    if progress.best_step is None:
        return
    weights = output_dir / "best" / ADAPTER_WEIGHTS
    if progress.best_step == progress.step:
        save_adapter(output_dir / "best", checkpoint.adapter, checkpoint.adapter_config)
    elif not weights.is_file() or digest_file(weights) != progress.best_sha256:
        print(f"resume: best/ is no longer the adapter of step {progress.best_step}; the search for the best restarts")
        progress.best_loss = progress.best_step = progress.best_sha256 = None
        progress.validations_without_best = 0


@contextmanager
def save_when_stopped(
    save: Callable[[], None], writer: CheckpointWriter | None, record: RunRecord | None
) -> Iterator[None]:
    """Save the run and print how to resume it, if all processes leave the block early together.

    Args:
        save: starts to write a checkpoint; every process must call it
        writer, record: of the main process, closed at the end of the block

    Raises:
        ValueError: if the disk cannot be written to; says what is intact and how to resume
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
            "fix the cause and run the same command with resume=auto"
        ) from error
    finally:
        for opened in filter(None, (writer, record)):
            opened.close()
