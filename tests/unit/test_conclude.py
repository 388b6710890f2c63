"""The end of a run: verdict, advice, ledger and report from its folder."""

import json

import pytest

from tests.runs import set_num_processes
from tests.unit.judged_runs import write_run
from tests.unit.synthetic_curves import approach, make_curves
from tune2gguf.runs.curves import Curves
from tune2gguf.runs.ledger import read_entries
from tune2gguf.verdict.conclude import conclude_run, list_free_dirs

STILL_FALLING, FLAT = make_curves(approach(1.0)), make_curves(approach(8))


def test_verdict_advice_and_ledger_say_the_same(tmp_path):
    run_dir = write_run(tmp_path / "runs/mine", STILL_FALLING)
    lines = conclude_run(run_dir)
    record = json.loads((run_dir / "verdict.json").read_text())
    ((entry,), _) = read_entries(tmp_path / "runs")
    assert record["label"] == entry.verdict == "underfitting"
    assert lines[0] == "verdict: underfitting"
    commands = [one["command"] for one in record["advice"]]
    assert [one["command"] for one in entry.advice] == commands
    assert f"  {commands[0]}" in lines
    assert "output_dir=" + str(tmp_path / "runs/mine-2") in commands[0]
    assert entry.best["loss"] == pytest.approx(STILL_FALLING.best.loss)
    assert entry.config["optimizer.lr"] == entry.config["learning_rate"] == 1e-3
    assert entry.outcome is None and record["outcome"] is None


def test_run_that_follows_says_whether_it_helped(tmp_path):
    parent = write_run(tmp_path / "runs/mine", STILL_FALLING)
    conclude_run(parent)
    child = write_run(tmp_path / "runs/mine-2", FLAT, "epochs=6", f"parent_run={parent}")
    lines = conclude_run(child)
    assert any("it helped" in line for line in lines)
    outcome = read_entries(tmp_path / "runs")[0][1].outcome
    assert outcome.helped is True
    assert outcome.difference == pytest.approx(FLAT.best.loss - STILL_FALLING.best.loss)
    assert json.loads((child / "verdict.json").read_text())["outcome"]["helped"] is True


def test_advice_that_was_followed_in_vain_is_not_given_again(tmp_path):
    parent = write_run(tmp_path / "runs/mine", STILL_FALLING)
    conclude_run(parent)
    first = json.loads((parent / "verdict.json").read_text())["advice"][0]
    assert first["changes"] == {"epochs": 12}
    child = write_run(tmp_path / "runs/mine-2", STILL_FALLING, "epochs=12", f"parent_run={parent}")
    lines = conclude_run(child)
    assert any("undecided" in line for line in lines)
    for run_dir in (child, parent):  # the parent is judged again, as after an extension
        conclude_run(run_dir)
        advice = json.loads((run_dir / "verdict.json").read_text())["advice"]
        assert advice and not any("epochs" in one["changes"] for one in advice)


def test_run_that_is_judged_again_adds_a_line_and_the_latest_counts(tmp_path):
    run_dir = write_run(tmp_path / "runs/mine", STILL_FALLING)
    conclude_run(run_dir)
    conclude_run(run_dir)
    assert (tmp_path / "runs/ledger.jsonl").read_text().count("\n") == 2
    assert len(read_entries(tmp_path / "runs")[0]) == 1


def test_run_without_validation_rows_is_told_how_to_get_some(tmp_path):
    run_dir = write_run(tmp_path / "runs/mine", Curves(FLAT.training, ()), "dataset.validation_files=null")
    lines = conclude_run(run_dir)
    assert lines[0] == "verdict: inconclusive"
    assert any("dataset.validation_split=0.1" in line for line in lines)


def test_parent_that_is_gone_is_said_and_stops_nothing(tmp_path):
    run_dir = write_run(tmp_path / "runs/mine", FLAT, f"parent_run={tmp_path / 'runs/gone'}")
    assert any("not comparable" in line for line in conclude_run(run_dir))


def test_number_of_processes_is_that_of_the_newest_checkpoint(tmp_path):
    run_dir = write_run(tmp_path / "runs/mine", STILL_FALLING)
    set_num_processes(run_dir, 2)
    conclude_run(run_dir)
    assert "--nproc_per_node 2" in json.loads((run_dir / "verdict.json").read_text())["advice"][0]["command"]


def test_next_folders_are_free_and_count_on(tmp_path):
    for name in ("mine-3", "mine-4"):
        (tmp_path / name).mkdir()
    assert list_free_dirs(tmp_path / "mine-4")[:2] == [str(tmp_path / "mine-2"), str(tmp_path / "mine-5")]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"not the folder of a run \(config\.yaml is missing\)"):
        conclude_run(tmp_path)


def test_ledger_is_named_as_it_is_reached_without_climbing(tmp_path, monkeypatch):
    run_dir = write_run(tmp_path / "runs/mine", FLAT)
    (tmp_path / "elsewhere").mkdir()
    for folder, shown in ((tmp_path, "runs/ledger.jsonl"), (tmp_path / "elsewhere", tmp_path / "runs/ledger.jsonl")):
        monkeypatch.chdir(folder)
        assert conclude_run(run_dir)[-1] == f"ledger: {shown}"
