"""Resume: a run killed anywhere ends with the bytes of an uninterrupted one, and impossible resumes are refused."""

import json
import random
import resource
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.conftest import make_conversations, write_rows
from tests.recipes.launch import Launch, count_lines, read_outcome, run_to_end
from tests.recipes.test_training import read_records, run_recipe
from tune2gguf.runs.run import open_run

# Dropout, accumulation and a short step: 20 rows in steps of 6 are 3 full steps and one of 2 rows, 12 steps in all.
HARD = ["lora_dropout=0.1", "batch_size=2", "gradient_accumulation_steps=3", "epochs=3", "learning_rate=0.01"]
STEPS = 12


@pytest.fixture
def arguments(run_arguments) -> list[str]:
    return [*run_arguments, *HARD, "save_every_n_steps=2"]


def kill_and_resume(arguments: list[str], folder: Path, moments: list[tuple[int, float]], **options) -> list[int]:
    """Kill the run at each moment (more lines of metrics, seconds after them), then let it end.

    Returns the lines of metrics at each kill.
    """
    arguments, log = [*arguments, f"output_dir={folder}", "resume=auto"], folder.with_suffix(".log")
    metrics, lines, wanted = folder / "metrics.jsonl", [], 0
    for more_lines, seconds in moments:
        wanted += more_lines
        launch = Launch(arguments, log, **options)
        launch.wait_until(lambda wanted=wanted: count_lines(metrics) >= wanted)
        time.sleep(seconds)
        launch.signal(signal.SIGKILL)
        if -signal.SIGKILL in launch.wait():
            lines.append(count_lines(metrics))
    run_to_end(arguments, log, **options)
    return lines


@pytest.mark.parametrize("packing", ["false", "true"])
def test_killed_and_resumed_equals_never_stopped(arguments, tmp_path, packing):
    arguments = [*arguments, f"dataset.packing={packing}", "max_seq_len=128", "eval_every_n_steps=3", "num_samples=1"]
    run_to_end([*arguments, f"output_dir={tmp_path / 'whole'}"], tmp_path / "log")
    whole = read_outcome(tmp_path / "whole")
    # The later kills hit a resumed run.
    assert kill_and_resume(arguments, tmp_path / "killed", [(1, 0.0), (4, 0.03), (4, 0.06)])
    assert read_outcome(tmp_path / "killed") == whole
    # Negative control: other masks give another result.
    run_to_end([*arguments, "seed=43", f"output_dir={tmp_path / 'other'}"], tmp_path / "log")
    assert read_outcome(tmp_path / "other")["last"] != whole["last"]


@pytest.mark.parametrize(
    ("num_processes", "changed", "num_kills"),
    [
        (1, [], 24),
        (2, [], 8),
        (2, ["parallel=shard", "dataset.packing=true", "max_seq_len=128", "batch_size=1"], 8),
    ],
    ids=["1 process", "2 replicate", "2 shard, packed"],
)
def test_killed_at_random_times_and_resumed_equals_never_stopped(
    arguments, tmp_path, num_processes, changed, num_kills
):
    """Half of the kills hit a checkpoint that is being written."""
    arguments = [*arguments, "save_every_n_steps=1", "eval_every_n_steps=1", "num_samples=1", *changed]
    run_to_end([*arguments, f"output_dir={tmp_path / 'whole'}"], tmp_path / "log", num_processes=num_processes)
    whole = read_outcome(tmp_path / "whole")
    draw = random.Random(num_processes)
    kills: list[int] = []
    # Runs that end before the kill do not count; their number depends on the machine's load.
    for number in range(40):
        folder = tmp_path / f"killed-{number}"
        moments = [(draw.randint(1, 6), draw.uniform(0.0, 0.1)) for _ in range(4)]
        kills += kill_and_resume(arguments, folder, moments, num_processes=num_processes)
        assert read_outcome(folder) == whole
        if len(kills) >= num_kills and len(set(kills)) > 3:
            break
    else:
        pytest.fail(f"too few kills hit a run: after these many lines of metrics: {kills}")
    print(f"{len(kills)} kills, after these many lines of metrics: {kills}")


def copy_run(arguments: list[str], tmp_path: Path) -> Path:
    """Run to the end in run_arguments' folder."""
    run_to_end(arguments, tmp_path / "log")
    return tmp_path / "runs/tiny"


def refuse(arguments: list[str], monkeypatch, capsys) -> str:
    """Run in this process, require an error's exit code, return its message."""
    with pytest.raises(SystemExit) as stopped:
        run_recipe(arguments, monkeypatch)
    assert stopped.value.code == 1
    message = capsys.readouterr().err
    assert "error: " in message
    return message[message.index("error: ") :]


def test_another_config_data_or_base_is_refused_with_what_differs(
    arguments, tmp_path, tiny_untied_base, monkeypatch, capsys
):
    folder = copy_run(arguments, tmp_path)
    before = read_outcome(folder)
    arguments = [*arguments, "resume=auto"]
    for change, said in (
        (["learning_rate=0.02"], "learning_rate: 0.01 in the checkpoint, 0.02 now"),
        (["seed=7", "batch_size=3"], "batch_size: 2 in the checkpoint, 3 now"),
        (["epochs=2"], "epochs: 3 in the checkpoint, 2 now (it may only be raised)"),
        ([f"base_dir={tiny_untied_base}"], "base model: the files differ"),
        ([f"dataset.files=[{write_rows(tmp_path / 'o.jsonl', make_conversations(21))}]"], "data: the rows differ"),
    ):
        message = refuse([*arguments, *change], monkeypatch, capsys)
        assert said in message
        assert f"resume=false output_dir={folder}-2" in message
    assert read_outcome(folder) == before


def test_moved_base_and_rows_are_the_same_run(arguments, tmp_path, tiny_base, monkeypatch):
    folder = copy_run(arguments, tmp_path)
    shutil.copytree(tiny_base, tmp_path / "base")
    shutil.copy(tmp_path / "train.jsonl", tmp_path / "moved.jsonl")
    before = read_outcome(folder)
    moved = [f"base_dir={tmp_path / 'base'}", f"dataset.files=[{tmp_path / 'moved.jsonl'}]"]
    run_recipe([*arguments, *moved, "resume=auto"], monkeypatch)
    assert read_outcome(folder) == before


def test_more_epochs_go_on_with_the_longer_schedule(arguments, tmp_path, monkeypatch, capsys):
    folder = copy_run([*arguments, "scheduler=linear"], tmp_path)
    run_recipe([*arguments, "scheduler=linear", "epochs=5", "resume=auto"], monkeypatch)
    assert "epochs raised from 3 to 5" in capsys.readouterr().out
    rates = {record["step"]: record["lr"] for record in read_records(folder, "lr")}
    assert sorted(rates) == list(range(1, 21))
    # Linear after one step of warm-up: 1 - p with p = (step - warm-up) / (steps - warm-up), steps counted from 0.
    assert rates[12] == pytest.approx(0.01 * (1 - 10 / 11))
    assert rates[13] == pytest.approx(0.01 * (1 - 11 / 19))
    assert "epochs: 5" in (folder / "config.yaml").read_text()
    assert json.loads((folder / "environment.json").read_text())["resumed"][0]["step"] == 12


def test_torchaos_optimizer_keeps_its_rate_in_a_tensor_and_resumes_exactly(arguments, tmp_path):
    """In processes of their own: the optimizer is compiled, which starts threads and workers."""
    pytest.importorskip("torchao")
    eight_bit = [*arguments, "optimizer._component_=torchao.optim.AdamW8bit"]
    folder = copy_run(eight_bit, tmp_path)
    whole = read_outcome(folder)
    first = min(whole["checkpoints"], key=lambda name: int(name.removeprefix("step_")))
    run_to_end([*eight_bit, f"resume={folder / 'checkpoints' / first}"], tmp_path / "log")
    assert read_outcome(folder) == whole
    # Negative control: torch's optimizer ends elsewhere.
    run_to_end([*arguments, f"output_dir={tmp_path / 'other'}"], tmp_path / "log")
    assert read_outcome(tmp_path / "other")["last"] != whole["last"]


def test_damaged_checkpoint_is_not_loaded_and_the_newest_good_one_is_named(arguments, tmp_path, monkeypatch, capsys):
    folder = copy_run([*arguments, "keep_last=3"], tmp_path)
    before = read_outcome(folder)
    state = folder / "checkpoints/step_12/state.pt"
    state.write_bytes(state.read_bytes()[:-1])
    message = refuse([*arguments, "keep_last=3", "resume=auto"], monkeypatch, capsys)
    assert "step_12: state.pt has" in message
    good = folder / "checkpoints/step_10"
    assert f"resume={good}" in message
    run_recipe([*arguments, "keep_last=3", f"resume={good}"], monkeypatch)
    assert read_outcome(folder) == before


def test_best_adapter_that_has_gone_ahead_of_the_checkpoint_comes_back(arguments, tmp_path, monkeypatch):
    """best/ is from step 12, but the run resumes from step 6, whose best is step 4."""
    folder = copy_run([*arguments, "keep_last=20"], tmp_path)
    before = read_outcome(folder)
    run_recipe([*arguments, "keep_last=20", f"resume={folder / 'checkpoints/step_6'}"], monkeypatch)
    assert read_outcome(folder) == before


def test_other_threads_are_said_to_round_otherwise(arguments, tmp_path, monkeypatch, capsys):
    folder = copy_run(arguments, tmp_path)
    environment = json.loads((folder / "environment.json").read_text())
    (folder / "environment.json").write_text(json.dumps({**environment, "threads": 64}))
    run_recipe([*arguments, "resume=auto"], monkeypatch)
    assert "the last bits may differ from an uninterrupted run: threads 64 before, 1 now" in capsys.readouterr().out
    run_recipe([*arguments, "resume=auto"], monkeypatch)
    assert "the last bits" not in capsys.readouterr().out


@pytest.mark.parametrize("num_processes", [1, 2])
def test_second_process_in_a_folder_is_told_who_writes_there_and_a_dead_one_blocks_nobody(
    arguments, tmp_path, num_processes
):
    folder, arguments = tmp_path / "runs/tiny", [*arguments, "epochs=300", "resume=auto"]
    first = Launch(arguments, tmp_path / "first.log", num_processes=num_processes)
    first.wait_until(lambda: count_lines(folder / "metrics.jsonl") > 2)
    second = Launch(arguments, tmp_path / "second.log", num_processes=num_processes)
    assert second.wait() == [1] * num_processes
    said = (tmp_path / "second.log").read_text()
    assert said.count("error: ") == 1 and "Traceback" not in said
    writer = f"process {first.processes[0].pid} on {socket.gethostname()}"
    assert f"error: {folder}: {writer} writes to it; wait until it has ended, or give another output_dir" in said
    first.kill()
    lines = count_lines(folder / "metrics.jsonl")
    third = Launch(arguments, tmp_path / "third.log", num_processes=num_processes)
    third.wait_until(lambda: count_lines(folder / "metrics.jsonl") > lines)
    third.kill()
    assert count_lines(folder / "metrics.jsonl") > lines, (tmp_path / "third.log").read_text()


def test_of_two_that_begin_at_once_one_makes_the_run(arguments, tmp_path):
    arguments = [*arguments, "resume=auto"]
    both = [Launch(arguments, tmp_path / f"{number}.log") for number in range(2)]
    assert 0 in [launch.wait()[0] for launch in both]  # the other is refused or finds a finished run
    steps = [record["step"] for record in read_records(tmp_path / "runs/tiny", "loss")]
    assert steps == list(range(1, STEPS + 1))


def test_existing_run_says_how_to_go_on(arguments, tmp_path, monkeypatch, capsys):
    copy_run(arguments, tmp_path)
    assert "To go on with that run, add resume=auto." in refuse(arguments, monkeypatch, capsys)


def test_folder_that_is_no_run_is_not_resumed(arguments, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs/tiny").mkdir(parents=True)
    (tmp_path / "runs/tiny/mine").write_text("precious")
    assert "is not the folder of a run" in refuse([*arguments, "resume=auto"], monkeypatch, capsys)
    assert "no such checkpoint" in refuse([*arguments, "resume=nowhere"], monkeypatch, capsys)
    assert [path.name for path in (tmp_path / "runs/tiny").iterdir()] == ["mine"]
    # Other programs have a config.yaml, too.
    (tmp_path / "runs/tiny/config.yaml").write_text("mine: 1\n")
    assert "environment.json: not found" in refuse([*arguments, "resume=auto"], monkeypatch, capsys)
    assert (tmp_path / "runs/tiny/config.yaml").read_text() == "mine: 1\n"
    assert {path.name for path in (tmp_path / "runs/tiny").iterdir()} == {"mine", "config.yaml"}


def test_only_the_last_checkpoints_are_kept(arguments, tmp_path):
    assert read_outcome(copy_run([*arguments, "save_every_n_steps=1", "keep_last=3"], tmp_path))["checkpoints"] == {
        "step_10",
        "step_11",
        "step_12",
    }


def test_run_folder_comes_into_being_whole_or_not_at_all(arguments, tmp_path):
    log, folder = tmp_path / "log", tmp_path / "runs/tiny"
    names = ("config.yaml", "environment.json", "data.json", "heldout.jsonl", "plan.json")
    launch = Launch(arguments, log)
    launch.wait_until(folder.exists)
    found = {path.name for path in folder.iterdir()}
    launch.kill()
    assert found >= {*names}
    sizes = {(folder / name).stat().st_size for name in names}
    # A limit on file sizes stands for a full disk: one file after the other reaches it.
    for limit in sorted(sizes):
        shutil.rmtree(folder, ignore_errors=True)
        launch = Launch(arguments, log, limits={0: (resource.RLIMIT_FSIZE, limit - 1)})
        assert launch.wait() == [1]
        assert not folder.exists() and "Traceback" not in log.read_text(), limit
    run_to_end([*arguments, "epochs=1", "resume=auto"], log)


@pytest.mark.parametrize("name", ["heldout.jsonl", "data.json", "plan.json"])
def test_damaged_file_of_the_start_is_made_again_when_the_run_goes_on(arguments, tmp_path, name):
    folder = copy_run([*arguments, "num_samples=1", "epochs=1"], tmp_path)
    before = (folder / name).read_bytes()
    (folder / name).write_bytes(before[: len(before) // 2])
    run_to_end([*arguments, "num_samples=1", "epochs=1", "resume=auto"], tmp_path / "log")
    assert (folder / name).read_bytes() == before


def test_run_without_a_checkpoint_that_is_given_other_rows_and_another_base_holds_those(
    arguments, tmp_path, tiny_untied_base
):
    folder = copy_run([*arguments, "epochs=1"], tmp_path)
    shutil.rmtree(folder / "checkpoints")  # as if it had been killed before the first
    other = write_rows(tmp_path / "other.jsonl", make_conversations(3, start=300))
    changed = [f"dataset.validation_files=[{other}]", f"base_dir={tiny_untied_base}", "resume=auto"]
    run_to_end([*arguments, "epochs=1", *changed], tmp_path / "log")
    assert (folder / "heldout.jsonl").read_bytes().count(b"\n") == 3
    assert json.loads((folder / "data.json").read_text())["validated"] == 3
    assert open_run(folder).base_dir == tiny_untied_base
