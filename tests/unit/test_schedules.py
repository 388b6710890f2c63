import math

import pytest
import torch

from tune2gguf.guide import SCHEDULERS
from tune2gguf.train.schedules import compute_rate_factor, get_schedule

PEAK, WARMUP, TOTAL = 2e-4, 4, 20


def expected_rate(name: str, step: int) -> float:
    if step < WARMUP:
        return PEAK * (step + 1) / WARMUP
    progress = (step - WARMUP) / (TOTAL - WARMUP)
    return PEAK * {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[name]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_optimizer_uses_the_closed_form_at_every_step(name):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=PEAK)
    schedule = get_schedule(optimizer, name=name, num_warmup_steps=WARMUP, num_training_steps=TOTAL)
    for step in range(TOTAL):
        before = parameter.item()
        parameter.grad = torch.ones(1)
        optimizer.step()
        schedule.step()
        assert before - parameter.item() == pytest.approx(expected_rate(name, step), rel=1e-4)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_first_and_last_step_learn_and_the_peak_ends_the_warmup(name, warmup):
    factors = [
        compute_rate_factor(step, name=name, num_warmup_steps=warmup, num_training_steps=30) for step in range(30)
    ]
    assert factors[0] > 0 and factors[-1] > 0
    assert factors[max(0, warmup - 1)] == 1.0 == max(factors)


def test_unknown_scheduler_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'exponential'.*cosine, linear, constant"):
        compute_rate_factor(0, name="exponential", num_warmup_steps=0, num_training_steps=1)
