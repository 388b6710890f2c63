"""Comparison of runs: they are ranked on the validation rows they share, if they share any."""

import html
import json
import re
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY, make_conversations
from tests.runs import copy_real_run, get_tiny_base
from tests.unit.judged_runs import write_run
from tests.unit.synthetic_curves import approach, make_curves
from tests.unit.test_run_ledger import take_rows
from tune2gguf.report.compare import find_differences, find_runs, format_groups, group_runs, write_comparison
from tune2gguf.runs.files import METRICS_FILE
from tune2gguf.runs.run import Run
from tune2gguf.verdict.conclude import conclude_run

GOOD, SLOW, POOR = (make_curves(approach(rate)) for rate in (8, 1, 0.5))


@pytest.fixture
def runs(tmp_path):
    write_run(tmp_path / "slow", SLOW, "learning_rate=2e-4")
    write_run(tmp_path / "good", GOOD, "learning_rate=1e-3")
    write_run(tmp_path / "other", POOR, "learning_rate=1e-3", has_other_rows=True)
    return tmp_path


def test_lowest_loss_is_first_and_other_rows_are_apart(runs):
    ranked, apart = group_runs(find_runs(runs))
    assert [run.name for run in ranked.runs] == ["good", "slow"]
    assert [run.name for run in apart.runs] == ["other"]
    assert ranked.num_rows == 40
    assert ranked.runs[0].behind is None
    behind = ranked.runs[1].behind
    assert behind.value == pytest.approx(SLOW.best.loss - GOOD.best.loss)
    assert behind.low < behind.value < behind.high
    text = format_groups([ranked, apart])
    assert "on other validation rows are listed apart" in text
    assert text.index("good") < text.index("slow") < text.index("other")


def test_runs_that_measured_parts_are_ranked_on_what_they_share(tmp_path):
    """One run has the harder half of the rows only; its loss must not be compared with another run's loss on all."""
    by_loss = sorted(range(40), key=lambda row: GOOD.final.row_losses[row] / GOOD.final.row_tokens[row])
    part = take_rows(GOOD, by_loss[20:])
    first = write_run(tmp_path / "part", part)
    second = write_run(tmp_path / "whole", SLOW)
    assert part.best.loss > take_rows(GOOD, range(40)).best.loss
    (group,) = group_runs([first, second])
    assert group.num_rows == 20
    losses = {run.name: run.curves.best.loss for run in group.runs}
    assert losses["part"] == pytest.approx(part.best.loss)
    assert losses["whole"] == pytest.approx(take_rows(SLOW, by_loss[20:]).best.loss)


def test_differences_leave_out_what_is_alike_and_what_follows(runs):
    (group, _) = group_runs(find_runs(runs))
    assert [run.differences["learning_rate"] for run in group.runs] == [1e-3, 2e-4]
    assert all(
        run.differences.keys() == {"learning_rate", "dataset.files", "dataset.validation_files", "data"}
        for run in group.runs
    )
    assert find_differences([{"a": 1}, {"a": 1, "b": None}]) == [{}, {}]
    assert find_differences([{"a": 1}, {"b": 0}]) == [{"a": 1, "b": None}, {"a": None, "b": 0}]


def test_verdict_is_that_of_the_run_or_one_so_far(runs):
    conclude_run(runs / "good")
    ((good, slow), _) = (group.runs for group in group_runs(find_runs(runs)))
    assert (good.verdict, good.is_finished) == ("good fit", True)
    assert (slow.verdict, slow.is_finished) == ("underfitting", False)


def test_time_and_memory_are_those_of_the_steps(runs):
    """100 steps of half a second."""
    group, _ = group_runs(find_runs(runs))
    assert group.runs[0].seconds == pytest.approx(50)
    assert group.runs[0].peak_memory_bytes == 2_000_000_000


@pytest.mark.parametrize(
    "overrides",
    [("epochs=2",), ("batch_size=2", "max_steps_per_epoch=1"), ("dataset.packing=true", "batch_size=1")],
    ids=["epochs", "max_steps_per_epoch", "packs"],
)
def test_time_of_a_real_run_is_that_of_its_steps(tmp_path, overrides):
    """Steps of any kind count: the last one of an epoch, a share of an epoch, packs."""
    run_dir = copy_real_run(get_tiny_base(), tmp_path / "run", *overrides, training=make_conversations(7))
    lines = [json.loads(line) for line in (run_dir / METRICS_FILE).read_text().splitlines()]
    seconds = sum(line["tokens"] / line["tokens_per_second"] for line in lines)
    assert group_runs([run_dir])[0].runs[0].seconds == pytest.approx(seconds)


def test_tokens_of_the_steps_are_those_of_the_data(tmp_path):
    run_dir = copy_real_run(get_tiny_base(), tmp_path / "run", "epochs=2", training=make_conversations(7))
    assert sum(step.tokens for step in Run(run_dir).curves.training) == 2 * Run(run_dir).data["training"]["tokens"]


def test_a_run_that_recorded_no_seconds_has_no_time():
    assert group_runs([REPOSITORY / "tests/data/run_of_version_1/runs/old"])[0].runs[0].seconds is None


def test_page_holds_every_run(runs):
    page = write_comparison(group_runs(find_runs(runs)), runs / "comparison.html").read_text()
    assert all(name in page for name in ("good", "slow", "other"))


def test_names_of_runs_stand_on_the_page_as_they_are(tmp_path):
    names = ["a\\b", 'c"d', "<e>", "$f$", "$\\frac{x}", "g'h", "_i", "j&amp;k", "%s{x}", "two words"]
    for name in names:
        write_run(tmp_path / name, GOOD)
    groups = group_runs(find_runs(tmp_path))
    page = write_comparison(groups, tmp_path / "page.html").read_text()
    shown = [html.unescape(text) for text in re.findall("<bdi>([^<]*)</bdi>", page)]
    assert all(shown.count(name) == 2 for name in names), "in the legend and in the table"
    assert all(name in format_groups(groups) for name in names)


def test_script_prints_the_table_and_where_the_page_is(runs):
    command = [sys.executable, "scripts/compare_runs.py", str(runs / "good"), str(runs / "slow")]
    done = subprocess.run(
        [*command, "--html", str(runs / "page.html")], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "learning_rate" in done.stdout and str(runs / "page.html") in done.stdout


def test_no_runs_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="no runs here"):
        find_runs(tmp_path)
