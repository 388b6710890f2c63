"""The rules that count longer runs and followed advice."""

import itertools
import statistics

import pytest

from tests.conftest import REPOSITORY
from tune2gguf.verdict.judge import GOOD_FIT, OVERFITTING, UNDERFITTING


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_random_choice_is_the_mean_of_the_best_over_all_choices(count):
    from follow_advice import expect_random

    losses = [0.9, 0.2, 0.5, 0.4, 0.7]
    chosen = [min(some) for some in itertools.combinations(losses, count)]
    assert expect_random(losses, count) == pytest.approx(statistics.mean(chosen))


def make_run(tests, *, rows=None):
    """Return a record with these test losses; `rows` are validation losses, by default the same."""
    return {"validations": [{"test": test, "rows": [row]} for test, row in zip(tests, rows or tests, strict=True)]}


def test_the_label_goes_by_the_test_rows_and_the_noise_of_seeds():
    from judge_chains import find_label

    lasts = {1: [1.0, 1.02], 2: [0.6, 0.62], 4: [0.59, 0.61]}
    falling, flat = ([make_run([3, last + 0.1, last]) for last in lasts[epochs]] for epochs in (1, 2))
    assert find_label([*enumerate(falling)], lasts, 1, 0.05) == UNDERFITTING
    assert find_label([*enumerate(flat)], lasts, 2, 0.05) == GOOD_FIT
    assert find_label([*enumerate(flat)], lasts, 2, 0.005) == UNDERFITTING
    assert find_label([*enumerate(flat)], lasts, 4, 0.05) is None
    # The best step is the run's choice, on its validation rows.
    risen = [make_run([3, 0.5, 0.6], rows=[3, 0.7, 0.8])] * 2
    assert find_label([*enumerate(risen)], lasts, 4, 0.05) == OVERFITTING
    blind = [make_run([3, 0.5, 0.6], rows=[3, 0.8, 0.7])] * 2
    assert find_label([*enumerate(blind)], lasts, 4, 0.05) is None


def test_unseen_rows_are_the_same_each_time_and_none_stands_twice():
    from unseen_data import UNSEEN, make_unseen

    for name in UNSEEN:
        rows = make_unseen(name, 300)
        assert rows == make_unseen(name, 300) and len(set(rows)) == 300
        assert rows != make_unseen(name, 300, seed=12)
