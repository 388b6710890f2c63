"""The verdict on the recorded real runs: right in nine of ten, and never reversed."""

import sys

import pytest

from tests.conftest import REPOSITORY
from tune2gguf.verdict.early import RECORDED as EARLY_RECORDED
from tune2gguf.verdict.judge import judge

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
from judge_chains import MENDED_ON, format_labels, label_chains, read_chains
from judge_chains import PAGE as CHAINS_PAGE
from judge_runs import (
    PAGE,
    RECORDED,
    count_reversed,
    foresee_early,
    format_early,
    format_table,
    make_curves,
    read_recorded,
)

sys.path.pop(0)


@pytest.fixture(scope="module")
def judged():
    return read_recorded(RECORDED)


def test_there_are_two_dozen_runs_on_three_data_sets_with_several_seeds(judged):
    assert len(judged) >= 24
    assert len({one.run.data_set for one in judged}) == 3
    assert all(
        len({one.run.seed for one in judged if one.run.kind_name == kind}) >= 2 for kind in ("overfit", "balanced")
    )


@pytest.fixture(scope="module")
def chains():
    return read_chains([REPOSITORY / "benchmarks/results/unseen.jsonl"])


@pytest.mark.slow
def test_nine_in_ten_are_right_on_sets_that_the_rule_was_not_made_on_and_none_is_taken_for_the_reverse(chains):
    labelled = label_chains(chains)
    pairs = [(wanted, label) for key, _, wanted, label in labelled if key[0] not in MENDED_ON]
    assert len(labelled) >= 60 and len(pairs) >= 40
    assert sum(wanted == label for wanted, label in pairs) >= 0.9 * len(pairs)
    assert count_reversed([one[2:] for one in labelled]) == 0
    assert format_labels(labelled) in (REPOSITORY / "docs" / CHAINS_PAGE).read_text(encoding="utf-8")


def test_none_of_the_runs_that_it_was_made_on_is_taken_for_the_reverse(judged):
    assert sum(one.is_right for one in judged) >= 0.8 * len(judged)
    assert count_reversed([(one.run.kind.expected, one.verdict.label) for one in judged]) == 0


@pytest.mark.slow
def test_a_run_says_at_a_third_how_often_that_was_right_of_all_recorded_runs(judged, chains):
    found = dict.fromkeys(EARLY_RECORDED, (0, 0))
    runs = [one.curves for one in judged]
    runs += [make_curves(one) for by_epochs in chains.values() for one in by_epochs.values()]
    for curves in runs:
        outlook = foresee_early(curves)
        if outlook is not None:
            told, came = found[outlook.label]
            found[outlook.label] = told + 1, came + (outlook.label == judge(curves).label)
    assert found == EARLY_RECORDED


def test_page_in_docs_has_the_verdicts_of_today(judged):
    page = (REPOSITORY / "docs" / PAGE).read_text(encoding="utf-8")
    assert format_table(judged) in page and format_early([(one.curves, one.verdict.label) for one in judged]) in page
