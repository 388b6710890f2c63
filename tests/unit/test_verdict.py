"""The verdict on curves of a known shape, and on curves that cannot be judged."""

import math
from dataclasses import replace

import numpy as np
import pytest

from tests.unit.synthetic_curves import approach, constant, cosine, make_curves
from tune2gguf.runs.curves import Curves, Validation
from tune2gguf.verdict.judge import (
    GOOD_FIT,
    INCONCLUSIVE,
    MIN_ROWS,
    NOTABLE_RISE,
    OVERFITTING,
    UNDERFITTING,
    find_notable_gain,
    judge,
)
from tune2gguf.verdict.paired import Forecast


def rise_after(best: float, *, by: float, path=None):
    """Return a path that falls like `path` and rises from `best` on, in all by this number of nats."""
    path = path or approach(10)
    return lambda progress: path(progress) + by * max(0.0, progress - best) / (1 - best)


SHAPES = {
    "flattened": (approach(12), GOOD_FIT),
    "flattened at once": (approach(40), GOOD_FIT),
    "still falling as a line": (lambda progress: 4 - progress, UNDERFITTING),
    "still falling as an exponential": (approach(1), UNDERFITTING),
    "falling late": (lambda progress: 4 - 3 / (1 + math.exp(-20 * (progress - 0.8))), UNDERFITTING),
    "hardly falling": (lambda progress: 4 - 0.004 * progress, UNDERFITTING),
    "not falling": (lambda progress: 4.0, UNDERFITTING),
    "risen by a tenth of the gain": (rise_after(0.4, by=0.4), OVERFITTING),
    "risen above the base": (rise_after(0.2, by=8), OVERFITTING),
    "rising from the start": (lambda progress: 4 + progress, OVERFITTING),
    "risen and come back": (lambda progress: approach(16)(progress) + math.sin(math.pi * progress) / 40, GOOD_FIT),
}


@pytest.mark.parametrize("schedule", [constant, cosine])
@pytest.mark.parametrize(("path", "expected"), SHAPES.values(), ids=SHAPES)
def test_shape_has_its_label(path, expected, schedule):
    verdict = judge(make_curves(path, schedule=schedule))
    assert verdict.label == expected, verdict.reasons
    assert verdict.reasons and all("nan" not in reason for reason in verdict.reasons)


def test_what_is_left_to_gain_is_held_against_the_loss_that_is_left():
    """The same curve, moved: 5 % more of the gain is most of a loss of 0.1, and little of one of 4."""
    low, high = (judge(make_curves(approach(3, floor=floor), noise=0.002)) for floor in (0.1, 4.1))
    assert low.figures["further_gain"] == pytest.approx(high.figures["further_gain"], abs=0.02)
    assert (low.label, high.label) == (UNDERFITTING, GOOD_FIT)


@pytest.mark.parametrize(("loss", "gain", "share"), [(8.0, 1.0, 0.08), (0.4, 1.0, 0.05), (0.04, 1.0, 0.01)])
def test_a_notable_gain_is_an_eighth_of_the_loss_between_two_bounds(loss, gain, share):
    assert find_notable_gain(loss, gain) == pytest.approx(share)


def test_figures_are_those_of_the_curves():
    curves = make_curves(rise_after(0.4, by=0.4), noise=0.001)
    figures = judge(curves).figures
    assert (figures["best_step"], figures["final_step"], figures["rows"]) == (40, 100, 40)
    assert figures["rise"] == pytest.approx(
        (curves.final.loss - curves.best.loss) / (curves.base.loss - curves.best.loss), rel=0.01
    )
    assert figures["rise_low"] < figures["rise"] < figures["rise_high"]
    assert figures["gain"] == pytest.approx(curves.base.loss - curves.best.loss, rel=0.01)
    assert figures["training_after"] < figures["training_before"]


def test_a_schedule_that_ends_at_zero_does_not_pass_for_convergence():
    """The loss falls linearly in the summed learning rate, which a cosine flattens. Negative control: under a constant
    rate the same losses are a flat curve."""

    def by_summed_cosine(progress):
        return 8 - 3 * (progress + math.sin(math.pi * progress) / math.pi)

    assert judge(make_curves(by_summed_cosine, schedule=cosine)).label == UNDERFITTING
    assert judge(make_curves(by_summed_cosine, schedule=constant)).label == GOOD_FIT


@pytest.mark.parametrize("bend", [0.1, 0.2, 0.4])
def test_the_interval_of_a_forecast_holds_what_a_long_tail_brings_under_a_cosine(bend):
    """A hyperbola in the summed learning rate: twice the learning adds bend / (2 + bend) of the gain. Negative control:
    an exponential through the same points, with the rows' interval alone."""

    def fall(progress):
        learned = progress + math.sin(math.pi * progress) / math.pi
        return 4 - 3 * learned * (1 + bend) / (learned + bend)

    figures, truth = judge(make_curves(fall, schedule=cosine)).figures, bend / (2 + bend)
    assert figures["further_gain_low"] < truth < figures["further_gain_high"]
    assert Forecast(figures["late_share_at"], math.inf).find_short_tail(figures["late_share_high"]) < truth


def test_a_significant_rise_that_is_not_worth_a_run_is_no_overfitting():
    tiny = judge(make_curves(rise_after(0.5, by=0.02), rows=2000, noise=0.01))
    assert tiny.figures["rise_low"] > 0
    assert tiny.figures["rise"] < NOTABLE_RISE
    assert tiny.label == GOOD_FIT
    assert judge(make_curves(rise_after(0.5, by=0.2), rows=2000, noise=0.01)).label == OVERFITTING


def test_noise_at_the_end_of_a_flat_curve_is_rarely_taken_for_overfitting():
    """The best of twenty noisy validations looks lower than the last; only the choice makes it so."""
    curves = [make_curves(approach(10), rows=30, noise=0.5, validations=20, seed=seed) for seed in range(40)]
    assert np.mean([(one.final.loss - one.best.loss) for one in curves]) > 0.1
    labels = [judge(one).label for one in curves]
    assert labels.count(OVERFITTING) <= 2
    assert UNDERFITTING not in labels


def test_a_rise_that_the_training_loss_shares_is_a_run_that_came_apart():
    curves = make_curves(rise_after(0.4, by=2), training=lambda progress: 0.5 + max(0.0, progress - 0.4))
    verdict = judge(curves)
    assert (verdict.label, verdict.figures["diverged"]) == (INCONCLUSIVE, 1)
    assert "the run diverged" in verdict.reasons[0]


@pytest.mark.parametrize("rows", range(1, MIN_ROWS))
def test_fewer_rows_than_a_sign_test_can_use_decide_nothing(rows):
    for path, _ in SHAPES.values():
        verdict = judge(make_curves(path, rows=rows))
        assert verdict.label == INCONCLUSIVE
        assert verdict.figures["rows_needed"] > rows
        assert f"about {verdict.figures['rows_needed']} would decide it" in verdict.reasons[0]


def test_with_the_rows_that_it_asks_for_it_decides():
    """At 80 % power. The number of rows is estimated from eight rows, so it is not exact."""
    path, labels = rise_after(0.5, by=0.3), []
    for seed in range(16):
        few = judge(make_curves(path, rows=8, noise=0.5, seed=seed))
        if few.label == INCONCLUSIVE:
            rows = int(few.figures["rows_needed"])
            labels.append(judge(make_curves(path, rows=rows, noise=0.5, seed=seed + 100)).label)
    assert len(labels) >= 5
    assert labels.count(OVERFITTING) >= 0.8 * len(labels)


def test_over_and_underfitting_are_never_taken_for_each_other():
    generator, labels = np.random.default_rng(0), []
    for seed in range(60):
        options = {"rows": int(generator.integers(2, 60)), "noise": generator.uniform(0, 0.6), "seed": seed}
        options["schedule"] = cosine if seed % 2 else constant
        falling = approach(generator.uniform(0.05, 1.2), gain=generator.uniform(0.3, 4))
        rising = rise_after(
            generator.uniform(0.2, 0.6), by=generator.uniform(0.3, 3), path=approach(generator.uniform(8, 20))
        )
        labels.append((judge(make_curves(falling, **options)).label, judge(make_curves(rising, **options)).label))
    under, over = zip(*labels, strict=True)
    assert OVERFITTING not in under and UNDERFITTING not in over
    assert under.count(UNDERFITTING) > 30 and over.count(OVERFITTING) > 30


def test_a_gain_that_is_sure_but_a_trifle_is_underfitting_however_flat_the_curve():
    trifle = judge(make_curves(approach(8, floor=3.9, gain=0.1)))
    assert trifle.figures["gain_low"] > 0
    assert trifle.label == UNDERFITTING and "is less than 5.0 % of it" in trifle.reasons[0]
    assert judge(make_curves(approach(8, floor=3.0, gain=1.0))).label == GOOD_FIT


def test_a_model_that_did_well_before_is_judged_by_what_it_gained():
    assert judge(make_curves(approach(8, floor=0.05, gain=0.05), noise=0.001)).label == GOOD_FIT


GOOD = make_curves(approach(8))
BASE, *TRAINED = GOOD.validations
UNJUDGED = {
    "no validation rows": (Curves(GOOD.training, ()), "there are no validation rows"),
    "only the base": (Curves(GOOD.training, (BASE,)), "ended before a validation"),
    "no base": (Curves(GOOD.training, tuple(TRAINED)), "not measured before training"),
    "one validation after training": (Curves(GOOD.training, (BASE, TRAINED[-1])), "too few validations"),
    "no losses of rows": (
        Curves(GOOD.training, tuple(replace(one, row_losses=()) for one in GOOD.validations)),
        "no losses of single rows",
    ),
    "base on other rows": (
        Curves(GOOD.training, (replace(BASE, row_tokens=BASE.row_tokens[::-1]), *TRAINED)),
        "measured on other rows",
    ),
    "nan": (Curves(GOOD.training, (*GOOD.validations[:-1], replace(TRAINED[-1], loss=math.nan))), "diverged"),
    "nothing": (Curves(), "there are no validation rows"),
}


@pytest.mark.parametrize(("curves", "reason"), UNJUDGED.values(), ids=UNJUDGED)
def test_curves_that_cannot_be_judged_say_what_they_lack(curves, reason):
    verdict = judge(curves)
    assert verdict.label == INCONCLUSIVE
    assert reason in verdict.reasons[0]


def test_one_validation_is_enough_to_see_that_nothing_was_gained():
    flat = make_curves(lambda progress: 4.0, validations=1)
    assert judge(flat).label == UNDERFITTING


def test_a_run_that_was_killed_is_judged_by_what_it_did():
    cut = make_curves(approach(8))
    killed = Curves(cut.training[:25], tuple(one for one in cut.validations if one.step <= 20))
    assert judge(killed).label == UNDERFITTING


def test_steps_left_out_and_missing_rates_do_not_stop_it():
    curves = make_curves(approach(8))
    skipped = [replace(step, loss=None, lr=None, skipped="loss is nan") for step in curves.training[40:45]]
    training = (*curves.training[:40], *skipped, *curves.training[45:])
    assert judge(Curves(training, curves.validations)).label == GOOD_FIT
    assert judge(Curves((), curves.validations)).label == GOOD_FIT


def test_the_same_curves_have_the_same_verdict():
    assert judge(make_curves(approach(4))) == judge(make_curves(approach(4)))


def test_equal_rows_are_no_division_by_zero():
    rows = {"rows": 6, "tokens": 60, "row_tokens": (10,) * 6}
    base = Validation(step=0, epoch=0, loss=4.0, row_losses=(40.0,) * 6, **rows)
    same = [replace(base, step=step) for step in (1, 2)]
    assert judge(Curves((), (base, *same))).label == UNDERFITTING
    better = [replace(one, loss=1.0, row_losses=(10.0,) * 6) for one in same]
    assert judge(Curves((), (base, *better))).label == GOOD_FIT
