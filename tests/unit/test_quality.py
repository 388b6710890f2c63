"""The comparison of benchmarks/quality.py: its interval, its rule for `worse`, and data sets without shared rows."""

import argparse
import json
import sys

import pytest
from scipy import stats

from tests.conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import quality

OURS = {1: 0.91, 2: 0.88, 3: 0.93, 4: 0.90}


def tabulate(path, other: dict[int, float]) -> list[str]:
    """Return the comparisons in which ours is worse than the other side."""
    records = [{"set": "units", "side": "base", "seed": None, "loss": 1.2}]
    for side, losses in (("ours", OURS), ("peft", other)):
        records += [{"set": "units", "side": side, "seed": seed, "loss": loss} for seed, loss in losses.items()]
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    _, worse = quality.tabulate(argparse.Namespace(records=path, sets=["units"], sides=["ours", "peft"]))
    return worse


def test_interval_is_that_of_a_paired_t_test():
    other = {1: 0.90, 2: 0.89, 3: 0.90, 4: 0.88}
    difference, half = quality.compare(OURS, other)
    expected = stats.ttest_rel([*OURS.values()], [*other.values()]).confidence_interval(0.95)
    assert (difference - half, difference + half) == pytest.approx((expected.low, expected.high))


def test_ours_is_worse_only_beyond_the_noise_of_seeds(tmp_path):
    noisy = {1: 0.95, 2: 0.80, 3: 0.96, 4: 0.87}
    assert tabulate(tmp_path / "noisy.jsonl", noisy) == []
    better = {seed: loss - 0.02 - 0.001 * seed for seed, loss in OURS.items()}
    assert len(tabulate(tmp_path / "better.jsonl", better)) == 1


@pytest.mark.parametrize("name", quality.SETS)
def test_no_held_out_row_is_trained_on(name):
    rows = [json.dumps(row) for row in quality.SETS[name](quality.NUM_TRAIN + quality.NUM_HELD_OUT)]
    assert len(set(rows)) == len(rows) == 320
