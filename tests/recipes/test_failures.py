"""Failing runs: one line gives the reason, saved files are intact, and no wrong value reaches the weights."""

import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import REPOSITORY, TINY_UNTIED, make_conversations, write_rows, write_tiny_base
from tests.recipes.launch import Launch, count_lines, find_free_port, run_to_end
from tests.recipes.test_training import read_adapter, read_records
from tune2gguf.runs.checkpoints import find_damage, list_checkpoints


def test_full_disk_ends_in_one_line_and_the_checkpoints_before_are_intact(run_arguments, tmp_path):
    """A limit on file sizes stands for a full disk: the metrics reach it during the run."""
    folder, log = tmp_path / "runs/tiny", tmp_path / "log"
    arguments = [*run_arguments, "epochs=60", "save_every_n_steps=20", "lora_rank=1"]
    launch = Launch(arguments, log, limits={0: (resource.RLIMIT_FSIZE, 50_000)})
    assert launch.wait() == [1]
    text = log.read_text()
    assert "Traceback" not in text
    assert f"error: {folder}/metrics.jsonl: File too large. The checkpoints before this are intact" in text
    checkpoints = list_checkpoints(folder / "checkpoints")
    assert checkpoints and all(find_damage(path) is None for path in checkpoints)


def test_last_checkpoint_that_cannot_be_written_is_an_error(run_arguments, tmp_path):
    """No later write would notice the failure. The limit is between the sizes of adapter and optimizer state."""
    folder, log = tmp_path / "runs/tiny", tmp_path / "log"
    launch = Launch([*run_arguments, "save_every_n_steps=100"], log, limits={0: (resource.RLIMIT_FSIZE, 60_000)})
    assert launch.wait() == [1]
    message = rf"error: {re.escape(str(folder))}/checkpoints/\.step_5\.\w+\.unfinished/state\.pt: File too large"
    assert re.search(message, log.read_text())
    assert (folder / "best/adapter_model.safetensors").is_file() and not (folder / "last").exists()
    assert not list((folder / "checkpoints").iterdir())
    run_to_end([*run_arguments, "resume=auto"], log)


@pytest.fixture
def small_disk(tmp_path):
    mounted = tmp_path / "disk"
    mounted.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(mounted)], capture_output=True)
    if done.returncode != 0:
        pytest.skip("mounting a small disk needs root")
    yield mounted
    subprocess.run(["umount", "--lazy", str(mounted)], check=True)


def test_checkpoint_that_does_not_fit_leaves_the_one_before(run_arguments, tmp_path, small_disk):
    folder, log = small_disk / "run", tmp_path / "log"
    arguments = [*run_arguments, "save_every_n_steps=1", "keep_last=20", "lora_rank=8", f"output_dir={folder}"]
    assert Launch(arguments, log).wait() == [1]
    assert "No space left on device. The checkpoints before this are intact" in log.read_text()
    checkpoints = list_checkpoints(folder / "checkpoints")
    assert checkpoints and all(find_damage(path) is None for path in checkpoints)


@pytest.fixture(scope="module")
def poisoned_base(tmp_path_factory) -> Path:
    """Return a base with an infinite embedding for one token, the tilde."""
    from tokenizers import Tokenizer

    base = write_tiny_base(tmp_path_factory.mktemp("bases") / "poisoned", TINY_UNTIED)
    weights = load_file(base / "model.safetensors")
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    weights["model.embed_tokens.weight"][tokenizer.encode("~").ids[0]] = float("inf")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    return base


@pytest.fixture
def poisoned(run_arguments, poisoned_base, tmp_path) -> list[str]:
    """Return arguments of a run with the token in row 8 only. Other rows share its pass."""
    rows = make_conversations(20)
    rows[7]["messages"][0]["content"] += " ~"
    path = write_rows(tmp_path / "poisoned.jsonl", rows)
    # This seed does not draw row 8 first: before any step, a loss that is not finite is the base's fault.
    cut = ["batch_size=1", "gradient_accumulation_steps=4", "epochs=2", "seed=3"]
    return [*run_arguments, *cut, f"base_dir={poisoned_base}", f"dataset.files=[{path}]"]


def test_step_that_is_not_finite_stops_the_run_before_it_and_names_the_row(poisoned, tmp_path):
    folder, log = tmp_path / "runs/tiny", tmp_path / "log"
    assert Launch(poisoned, log).wait() == [1]
    steps = read_records(folder, "loss")
    message = f"error: step {len(steps) + 1}: the loss is nan, so the step is not applied; rows: "
    assert f"{message}{tmp_path}/poisoned.jsonl, line 8. To skip such steps: on_nonfinite=skip" in log.read_text()
    assert "In the base, model.embed_tokens.weight has 32 non-finite values" in log.read_text()
    assert "Traceback" not in log.read_text()
    newest = list_checkpoints(folder / "checkpoints")[-1]
    assert newest.name == f"step_{len(steps)}" and find_damage(newest) is None
    # The message's way out.
    run_to_end([*poisoned, "resume=auto", "on_nonfinite=skip"], log)
    assert len(read_records(folder, "skipped")) == 2 and len(read_records(folder, "loss")) == 8


@pytest.mark.parametrize("num_processes", [1, 2])
def test_skipped_step_leaves_the_adapter_finite_and_the_steps_counted(poisoned, tmp_path, num_processes):
    folder, log = tmp_path / "runs/tiny", tmp_path / "log"
    text = run_to_end([*poisoned, "on_nonfinite=skip"], log, num_processes=num_processes)
    skipped = read_records(folder, "skipped")
    assert len(skipped) == 2  # once per epoch
    assert all(record["skipped"].endswith(f"{tmp_path}/poisoned.jsonl, line 8") for record in skipped)
    assert text.count("note: step") == 2
    steps = sorted(record["step"] for record in [*skipped, *read_records(folder, "loss")])
    assert steps == list(range(1, 1 + 2 * (5 if num_processes == 1 else 3)))
    assert all(np.isfinite(weight).all() for weight in read_adapter(folder).values())


@pytest.mark.parametrize("rank", [0, 1])
def test_error_of_one_process_ends_all_with_its_line(run_arguments, tmp_path, rank):
    """Its machine lacks the base."""
    absent = {rank: [f"base_dir={tmp_path / 'absent'}"]}
    launch = Launch(run_arguments, tmp_path / "log", num_processes=2, added=absent)
    started = time.monotonic()
    assert launch.wait(timeout=30) == [1, 1]
    assert time.monotonic() - started < 30
    text = (tmp_path / "log").read_text()
    whose = "process 1: " if rank == 1 else ""
    assert text.count("error: ") == 1 and f"error: {whose}no base model in {tmp_path / 'absent'}" in text
    assert "Traceback" not in text
    assert not (tmp_path / "runs/tiny").exists()


def test_process_that_falls_silent_ends_the_others_with_a_line(run_arguments, tmp_path):
    """A stopped process stands in for a machine without power: it closes no connection."""
    launches = []
    for silent in (0, 1):
        folder, log = tmp_path / f"runs/{silent}", tmp_path / f"{silent}.log"
        launch = Launch([*run_arguments, "epochs=500", f"output_dir={folder}"], log, num_processes=2)
        launch.wait_until(lambda metrics=folder / "metrics.jsonl": count_lines(metrics) >= 3)
        launch.signal(signal.SIGSTOP, rank=silent)
        launches.append((silent, launch, time.monotonic()))
    for silent, launch, stopped in launches:
        launch.processes[1 - silent].join(40)
        seconds = time.monotonic() - stopped
        launch.signal(signal.SIGKILL, rank=silent)
        assert launch.wait()[1 - silent] == 1 and seconds < 30
        text = launch.log.read_text()
        assert text.count("error: ") == 1 and f"error: process {silent} has been silent for 24 s" in text
        assert "Traceback" not in text


def test_machine_with_other_rows_or_arguments_is_refused(run_arguments, tmp_path):
    rows = write_rows(tmp_path / "other.jsonl", make_conversations(20, start=1))
    launch = Launch(
        run_arguments,
        tmp_path / "log",
        num_processes=2,
        added={1: [f"dataset.files=[{rows}]", "learning_rate=0.5", f"output_dir={tmp_path / 'elsewhere'}"]},
    )
    assert launch.wait(timeout=60) == [1, 1]
    text = (tmp_path / "log").read_text()
    assert text.count("error: ") == 1 and "process 1 differs from process 0" in text
    assert "data: the rows differ" in text and "0.5 in process 1" in text
    assert "the base model" not in text and "output_dir" not in text and "Traceback" not in text
    assert not (tmp_path / "runs/tiny").exists()


def test_write_error_of_the_main_process_ends_all_with_its_line(run_arguments, tmp_path):
    """The other process is within a step, and receives the error there."""
    limits = {0: (resource.RLIMIT_FSIZE, 50_000)}
    launch = Launch([*run_arguments, "epochs=200", "lora_rank=1"], tmp_path / "log", num_processes=2, limits=limits)
    assert launch.wait(timeout=60) == [1, 1]
    text = (tmp_path / "log").read_text()
    assert text.count("error: ") == 1 and "error: process 0: " in text and "File too large" in text
    assert "Traceback" not in text


def test_processes_of_a_run_end_before_python_ends_in_which_their_threads_could_abort(tmp_path):
    """One of twelve runs aborted on a busy machine. Here Python's exit always aborts, as the run alone shows."""
    program = tmp_path / "program.py"
    program.write_text(
        "import atexit, os\n"
        "from tune2gguf.distributed.failures import end_together\n"
        "atexit.register(os.abort)\n"
        "with end_together():\n"
        "    print('done')\n"
    )
    together = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    together += ["--master-port", str(find_free_port()), str(program)]
    done = subprocess.run(together, cwd=REPOSITORY, capture_output=True, text=True)
    # The processes' line breaks may be interleaved.
    assert (done.returncode, done.stdout.count("done")) == (0, 2), done.stderr
    alone = subprocess.run([sys.executable, str(program)], cwd=REPOSITORY, capture_output=True)
    assert alone.returncode == -signal.SIGABRT
