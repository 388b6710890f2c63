"""The forecast at a third of a run: it follows from the measured curve and the remaining learning."""

import pytest

from tests.unit.synthetic_curves import approach, constant, cosine, make_curves
from tune2gguf.runs.curves import Curves
from tune2gguf.train.schedules import compute_learned_share, get_schedule
from tune2gguf.verdict.early import foresee, is_due
from tune2gguf.verdict.judge import GOOD_FIT, OVERFITTING, UNDERFITTING


def cut(curves: Curves, step: int) -> Curves:
    kept = tuple(one for one in curves.validations if one.step <= step)
    return Curves(curves.training[:step], kept)


def test_it_is_said_once_at_the_first_validation_from_a_third_on_that_has_two_points():
    curves = make_curves(approach(8))
    assert [step for step in range(10, 101, 10) if is_due(cut(curves, step), 100)] == [40]
    few = make_curves(approach(8), validations=3)
    assert [step for step in (33, 67, 100) if is_due(cut(few, step), 100)] == [67]
    assert not is_due(make_curves(approach(8), validations=1), 100)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (approach(12), GOOD_FIT),
        (approach(0.5), UNDERFITTING),
        (lambda progress: 4.0, UNDERFITTING),
        (lambda progress: approach(40)(progress) + 3 * progress, OVERFITTING),
    ],
)
def test_a_shape_is_foreseen(path, expected):
    assert foresee(cut(make_curves(path), 40), learned=0.4).label == expected


def test_the_learning_to_come_decides():
    """A curve that is not flat at a third will be at the end. Negative control: no learning remains."""
    so_far = cut(make_curves(approach(5)), 40)
    assert foresee(so_far, learned=0.4).label == GOOD_FIT
    assert foresee(so_far, learned=1.0).label == UNDERFITTING


def test_too_few_rows_say_nothing():
    assert foresee(cut(make_curves(approach(8), rows=4), 40), learned=0.4) is None


@pytest.mark.parametrize(("name", "shape"), [("constant", constant), ("cosine", cosine)])
def test_the_learned_share_is_that_of_the_summed_rate(name, shape):
    import torch

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = get_schedule(optimizer, name=name, num_warmup_steps=0, num_training_steps=400)
    rates = [shape(step / 400) for step in range(400)]
    for step in (1, 130, 400):
        assert compute_learned_share(schedule, step, 400) == pytest.approx(sum(rates[:step]) / sum(rates), rel=1e-6)
