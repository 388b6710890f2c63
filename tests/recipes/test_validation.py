"""Validation during a run: at the configured steps, without changing the training."""

import json
from pathlib import Path

import pytest

from tests.conftest import make_conversations, make_unseen_conversations, write_rows
from tests.recipes.launch import Launch, count_lines, read_outcome, run_to_end
from tests.recipes.test_training import read_records, run_recipe

# 20 rows in steps of 4: 5 steps per epoch. The learning rate is so high that the validation loss goes up and down.
UNSTEADY = [
    "seed=5",
    "epochs=4",
    "learning_rate=0.02",
    "scheduler=constant",
    "eval_every_n_steps=2",
    "early_stopping_patience=2",
]


@pytest.fixture
def unsteady_arguments(run_arguments, tmp_path) -> list[str]:
    """Return arguments of a run whose first validation is its best one."""
    unseen = write_rows(tmp_path / "unseen.jsonl", make_unseen_conversations())
    return [*run_arguments, *UNSTEADY, f"dataset.validation_files=[{unseen}]"]


def read_samples(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_validations_come_before_training_every_n_steps_and_at_each_epochs_end(run_arguments, tmp_path, monkeypatch):
    run_recipe([*run_arguments, "epochs=2", "eval_every_n_steps=2", "max_val_rows=3"], monkeypatch)
    records = read_records(tmp_path / "runs/tiny", "val_loss")
    assert [record["step"] for record in records] == [0, 2, 4, 5, 6, 8, 10]
    assert [record["epoch"] for record in records] == [0, 0, 0, 1, 1, 1, 2]
    assert len({tuple(record["val_row_indices"]) for record in records}) == 1
    for record in records:
        assert len(record["val_row_losses"]) == len(record["val_row_tokens"]) == record["val_rows"] == 3
        assert sum(record["val_row_losses"]) / sum(record["val_row_tokens"]) == pytest.approx(record["val_loss"])
        assert record["val_tokens"] == sum(record["val_row_tokens"])
        assert record["val_low"] <= record["val_loss"] <= record["val_high"]


def test_samples_and_validations_change_no_byte_of_the_adapter(run_arguments, tmp_path, monkeypatch, capsys):
    often = ["num_samples=2", "eval_every_n_steps=1", "metric_logger=null"]
    seldom = ["num_samples=0", "eval_every_n_steps=100"]
    for name, how in (("often", often), ("seldom", seldom)):
        run_recipe([*run_arguments, "epochs=2", "lora_dropout=0.1", *how, f"output_dir={tmp_path / name}"], monkeypatch)
    adapters = [(tmp_path / name / "last/adapter_model.safetensors").read_bytes() for name in ("often", "seldom")]
    assert adapters[0] == adapters[1]
    samples = read_samples(tmp_path / "often")
    assert [(sample["step"], sample["row"]) for sample in samples] == [
        (step, row) for step in (0, 5, 10) for row in (0, 1)
    ]
    assert not (tmp_path / "seldom/samples.jsonl").exists()
    assert "samples: 2 validation prompts, answered before training" in capsys.readouterr().out


def test_rows_without_validation_rows_train_without_validation(run_arguments, tmp_path, monkeypatch, capsys):
    without = ["dataset.validation_files=null", "max_val_rows=null", "num_samples=3"]
    run_recipe([*run_arguments, *without], monkeypatch)
    folder = tmp_path / "runs/tiny"
    assert len(read_records(folder, "loss")) == 5 and read_records(folder, "val_loss") == []
    assert not (folder / "samples.jsonl").exists() and not (folder / "best").exists()
    assert "validation: no rows, so over- and underfitting stay unseen" in capsys.readouterr().out


@pytest.mark.parametrize("num_processes", [1, 2])
def test_early_stopping_ends_after_so_many_validations_without_a_best_and_resumes_as_it_was(
    unsteady_arguments, tmp_path, num_processes
):
    arguments = [*unsteady_arguments, "num_samples=1", f"batch_size={4 // num_processes}"]
    folder, log = tmp_path / "whole", tmp_path / "whole.log"
    text = run_to_end([*arguments, f"output_dir={folder}"], log, num_processes=num_processes)
    whole = read_outcome(folder)
    records = [record for record in read_records(folder, "val_loss") if record["step"] > 0]
    losses = [record["val_loss"] for record in records]
    best = losses.index(min(losses))
    assert len(losses) == best + 3, "negative control: without patience there would be more"
    last = records[-1]["step"]
    assert len(read_records(folder, "loss")) == last < 20
    assert f"stopped early after step {last}: 2 validations in a row without a new best; best/ is the adapter " in text
    assert read_samples(folder)[-1]["step"] == last
    # Killed and resumed, the run stops at the same step; resumed at its end, it stays there.
    folder, log = tmp_path / "killed", tmp_path / "killed.log"
    arguments += [f"output_dir={folder}", "resume=auto", "save_every_n_steps=1"]
    launch = Launch(arguments, log, num_processes=num_processes)
    launch.wait_until(lambda: count_lines(folder / "metrics.jsonl") >= 4)
    launch.kill()
    for _ in range(2):
        run_to_end(arguments, log, num_processes=num_processes)
        found = read_outcome(folder)
        assert {key: found[key] for key in found.keys() - {"checkpoints"}} == {
            key: whole[key] for key in whole.keys() - {"checkpoints"}
        }


def test_stopped_run_goes_on_when_patience_is_taken_back(unsteady_arguments, tmp_path, monkeypatch):
    run_recipe(unsteady_arguments, monkeypatch)
    assert len(read_records(tmp_path / "runs/tiny", "loss")) < 20
    without = [*unsteady_arguments, "early_stopping_patience=null"]
    run_recipe([*without, "resume=auto"], monkeypatch)
    run_recipe([*without, f"output_dir={tmp_path / 'whole'}"], monkeypatch)
    found, whole = read_outcome(tmp_path / "runs/tiny"), read_outcome(tmp_path / "whole")
    assert (found["metrics"], found["last"], found["best"]) == (whole["metrics"], whole["last"], whole["best"])
    assert len(read_records(tmp_path / "whole", "loss")) == 20


def test_more_epochs_keep_the_rows_and_steps_of_the_validation(run_arguments, tmp_path, monkeypatch):
    rows = write_rows(tmp_path / "many.jsonl", make_conversations(40, start=200))
    arguments = [*run_arguments, f"dataset.validation_files=[{rows}]", "max_val_rows=null"]
    run_recipe(arguments, monkeypatch)
    run_recipe([*arguments, "epochs=3", "resume=auto"], monkeypatch)
    run_recipe([*arguments, "epochs=3", f"output_dir={tmp_path / 'other'}"], monkeypatch)
    chosen = {tuple(record["val_row_indices"]) for record in read_records(tmp_path / "runs/tiny", "val_loss")}
    assert len(chosen) == 1
    (others,) = {tuple(record["val_row_indices"]) for record in read_records(tmp_path / "other", "val_loss")}
    assert len(others) != len(*chosen), "negative control: planned anew, it would be another number"


@pytest.mark.parametrize("base_weights", ["fp32", "nf4"])
def test_sharded_processes_answer_together_as_one_does(run_arguments, tmp_path, base_weights, wide_base):
    arguments = [*run_arguments, "num_samples=2", "learning_rate=0.01", f"base_dir={wide_base}"]
    arguments += [f"base_weights={base_weights}", "batch_size=2"]
    for parallel in ("replicate", "shard"):
        options = [f"parallel={parallel}", f"output_dir={tmp_path / parallel}"]
        run_to_end([*arguments, *options], tmp_path / f"{parallel}.log", num_processes=2)
    replicated, sharded = (read_samples(tmp_path / name) for name in ("replicate", "shard"))
    assert sharded == replicated
    assert len({sample["reply"] for sample in sharded}) > 2, "negative control: replies change with the adapter"


TENSORBOARD = "metric_logger._component_=torchtune.training.metric_logging.TensorBoardLogger"


def test_tensorboard_has_the_numbers_of_the_metrics(run_arguments, tmp_path, monkeypatch):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path / "runs/tiny"
    arguments = [*run_arguments, TENSORBOARD, "metric_logger.log_dir=${output_dir}/tensorboard"]
    run_recipe(arguments, monkeypatch)
    (events,) = (folder / "tensorboard").iterdir()
    accumulator = reader.EventAccumulator(str(events))
    accumulator.Reload()
    for name in ("loss", "lr", "grad_norm", "tokens_per_second", "peak_memory_bytes", "val_loss", "val_low"):
        logged = [(event.step, event.tensor_proto.float_val[0]) for event in accumulator.Tensors(name)]
        expected = [(record["step"], record[name]) for record in read_records(folder, name)]
        assert logged == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected] and logged
    # Another logger, or none, gives the same run.
    run_recipe([*run_arguments, "epochs=2", "resume=auto"], monkeypatch)
    assert len(read_records(folder, "loss")) == 10


def test_logger_that_fails_on_the_way_is_said_once_and_the_run_goes_on(run_arguments, tmp_path):
    logger = [
        "metric_logger._component_=tests.failing_logger.FailingLogger",
        f"metric_logger.path={tmp_path / 'steps'}",
    ]
    said = run_to_end([*run_arguments, *logger, "epochs=2"], tmp_path / "log")
    assert len(read_records(tmp_path / "runs/tiny", "loss")) == 10 and (tmp_path / "runs/tiny/last").is_dir()
    assert (tmp_path / "steps").read_text() == "0\n1\n"
    [note] = [line for line in said.splitlines() if "FailingLogger" in line]
    assert note.strip().endswith(
        "warning: metric_logger: FailingLogger failed and is switched off; metrics.jsonl has everything: "
        "RuntimeError: the service is gone"
    )
    # This logger fails only on close.
    said = run_to_end(
        [
            *run_arguments,
            *logger,
            "max_steps_per_epoch=1",
            "resume=false",
            "dataset.validation_files=null",
            f"output_dir={tmp_path / 'runs/other'}",
        ],
        tmp_path / "other.log",
    )
    assert said.count("warning: metric_logger: FailingLogger") == 1 and "No space left on device" in said
