"""The ledger of runs: it loses no line, and records whether an advice helped."""

import json
import multiprocessing
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.judged_runs import write_run
from tests.unit.synthetic_curves import approach, make_curves
from tune2gguf.runs.curves import Curves
from tune2gguf.runs.files import LEDGER_FILE
from tune2gguf.runs.ledger import Entry, append_entry, read_entries
from tune2gguf.runs.validation_rows import digest_validation_rows
from tune2gguf.runs.verdict_file import Outcome
from tune2gguf.verdict.lineage import compare_with_parent, describe_outcome, find_family, list_tried

ENTRY = Entry(run="a", time="t", config={"epochs": 3}, data="d", base="b", heldout="h", verdict="good fit")
HELPED, IN_VAIN, UNDECIDED = (
    Outcome(helped=helped, difference=0.0, low=0.0, high=0.0, rows=9, final_difference=0.0)
    for helped in (True, False, None)
)


def append_many(folder: Path, writer: int) -> None:
    for number in range(25):
        # Longer than an atomic write of a pipe or page: unlocked writers would interleave.
        append_entry(folder, replace(ENTRY, run=f"{writer}-{number}", config={"text": "x" * 20_000}))


def test_several_writers_lose_and_mix_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=append_many, args=(tmp_path, writer)) for writer in range(6)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    lines = (tmp_path / LEDGER_FILE).read_text().splitlines()
    assert {json.loads(line)["run"] for line in lines} == {f"{w}-{n}" for w in range(6) for n in range(25)}


def test_entry_comes_back_as_it_was_written(tmp_path):
    entry = replace(ENTRY, parent_run="p", advice=[{"command": "x", "changes": {"epochs": 1}}], outcome=HELPED)
    append_entry(tmp_path, entry)
    assert read_entries(tmp_path) == ([entry], [])


def test_latest_line_of_a_run_counts(tmp_path):
    for entry in (ENTRY, replace(ENTRY, run="b"), replace(ENTRY, verdict="overfitting")):
        append_entry(tmp_path, entry)
    assert [(entry.run, entry.verdict) for entry in read_entries(tmp_path)[0]] == [
        ("a", "overfitting"),
        ("b", "good fit"),
    ]


def test_half_a_line_of_a_killed_writer_swallows_nothing(tmp_path):
    append_entry(tmp_path, ENTRY)
    with (tmp_path / LEDGER_FILE).open("a") as file:
        file.write('{"run": "torn", "ti')
    append_entry(tmp_path, replace(ENTRY, run="b"))
    entries, problems = read_entries(tmp_path)
    assert [entry.run for entry in entries] == ["a", "b"]
    assert len(problems) == 1 and f"{LEDGER_FILE}, line 2: skipped" in problems[0]


def test_no_ledger_has_no_entries(tmp_path):
    assert read_entries(tmp_path) == ([], [])


PARENT = make_curves(approach(1.5))


@pytest.mark.parametrize(
    ("path", "noise", "helped"),
    [(approach(8), 0.02, True), (approach(0.3), 0.02, False), (approach(1.5), 0.02, None), (approach(1.6), 3.0, None)],
    ids=["better", "worse", "the same", "too noisy to tell"],
)
def test_outcome_says_whether_it_helped_and_by_how_much(path, noise, helped, tmp_path):
    parent = write_run(tmp_path / "parent", PARENT)
    child = make_curves(path, noise=noise, seed=0)
    outcome = compare_with_parent(write_run(tmp_path / "child", child), parent)
    assert outcome.helped is helped
    assert outcome.difference == pytest.approx(child.best.loss - PARENT.best.loss)
    assert outcome.final_difference == pytest.approx(child.final.loss - PARENT.final.loss)
    assert outcome.low <= outcome.difference <= outcome.high and outcome.rows == 40
    words = {True: "it helped", False: "it did not help", None: "undecided"}
    assert words[helped] in describe_outcome(outcome, "runs/parent")
    assert f"{outcome.difference:+.4f}" in describe_outcome(outcome, "runs/parent")


def take_rows(curves: Curves, rows: Sequence[int]) -> Curves:
    """Return curves over some of the validation rows only."""
    measured = [
        replace(
            one,
            rows=len(rows),
            loss=sum(one.row_losses[row] for row in rows) / sum(one.row_tokens[row] for row in rows),
            row_losses=tuple(one.row_losses[row] for row in rows),
            row_tokens=tuple(one.row_tokens[row] for row in rows),
            row_indices=tuple(rows),
        )
        for one in curves.validations
    ]
    return Curves(curves.training, tuple(measured))


def test_runs_that_measured_other_parts_are_compared_on_what_they_share(tmp_path):
    child = take_rows(make_curves(approach(8)), range(10, 40))
    child_dir = write_run(tmp_path / "child", child)
    outcome = compare_with_parent(child_dir, write_run(tmp_path / "parent", PARENT))
    theirs = take_rows(PARENT, range(10, 40))
    assert outcome.rows == 30
    assert outcome.difference == pytest.approx(child.best.loss - theirs.best.loss)


@pytest.mark.parametrize("what", ["other rows", "no folder", "no losses"])
def test_runs_that_cannot_be_compared_say_why(what, tmp_path):
    child = write_run(tmp_path / "child", make_curves(approach(8)))
    parent = tmp_path / "parent"
    if what == "other rows":
        write_run(parent, PARENT, has_other_rows=True)
    elif what == "no losses":
        write_run(parent, Curves(PARENT.training, ()))
    outcome = compare_with_parent(child, parent)
    assert outcome.helped is None and outcome.difference is None and outcome.problem
    assert "not comparable" in describe_outcome(outcome, "runs/parent")


def test_digest_is_of_the_rows_whatever_their_order(tmp_path):
    curves = make_curves(approach(8))
    first = write_run(tmp_path / "first", curves)
    reordered = take_rows(curves, range(40))
    backwards = replace(
        reordered.final,
        row_losses=reordered.final.row_losses[::-1],
        row_tokens=reordered.final.row_tokens[::-1],
        row_indices=reordered.final.row_indices[::-1],
    )
    assert digest_validation_rows(first, curves.final) == digest_validation_rows(first, backwards)
    assert digest_validation_rows(first, curves.final) != digest_validation_rows(
        first, take_rows(curves, range(39)).final
    )
    other = write_run(tmp_path / "other", curves, has_other_rows=True)
    assert digest_validation_rows(first, curves.final) != digest_validation_rows(other, curves.final)


def test_tried_are_the_changes_in_the_family_that_brought_no_gain():
    def make(run, parent, outcome=None, **config):
        base = {"epochs": 3, "learning_rate": 1e-4, "lora_dropout": 0.1}
        return replace(ENTRY, run=run, parent_run=parent, outcome=outcome, config=base | config)

    entries = [
        make("root", None),
        make("more", "root", IN_VAIN, epochs=6),
        make("faster", "root", HELPED, learning_rate=2e-4),
        make("faster-drier", "faster", UNDECIDED, learning_rate=2e-4, lora_dropout=0.0),
        make("stranger", "elsewhere", IN_VAIN, epochs=9),
        make("strangers-child", "stranger", IN_VAIN, epochs=1),
    ]
    family = find_family(entries, "faster", "root")
    assert family == {"root", "more", "faster", "faster-drier"}
    assert list_tried(entries, family) == {frozenset({("epochs", "up")}), frozenset({("lora_dropout", "down")})}


def test_runs_that_name_each_other_as_parents_do_not_hang():
    entries = [replace(ENTRY, run="a", parent_run="b"), replace(ENTRY, run="b", parent_run="a")]
    assert find_family(entries, "a", "b") == {"a", "b"}
