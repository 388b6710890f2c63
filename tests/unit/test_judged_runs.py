"""The verdict on the recorded real runs: right in nine of ten, and never reversed."""

import sys

import pytest

from tests.conftest import REPOSITORY
from tune2gguf.verdict.early import RECORDED as EARLY_RECORDED

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
from judge_runs import PAGE, RECORDED, count_reversed, foresee_early, format_early, format_table, read_recorded

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


def test_nine_in_ten_are_right_and_none_is_taken_for_the_reverse(judged):
    assert sum(one.is_right for one in judged) >= 0.9 * len(judged)
    assert count_reversed([(one.run.kind.expected, one.verdict.label) for one in judged]) == 0


def test_a_run_says_at_a_third_how_often_that_was_right_of_these(judged):
    found = dict.fromkeys(EARLY_RECORDED, (0, 0))
    for one in judged:
        outlook = foresee_early(one.curves)
        if outlook is not None:
            told, came = found[outlook.label]
            found[outlook.label] = told + 1, came + (outlook.label == one.verdict.label)
    assert found == EARLY_RECORDED


def test_page_in_docs_has_the_verdicts_of_today(judged):
    page = (REPOSITORY / "docs" / PAGE).read_text(encoding="utf-8")
    assert format_table(judged) in page and format_early(judged) in page
