"""Validation plan: at most a tenth of the training time, the same rows every time, no row silently left out."""

import hashlib

import numpy as np
import pytest
import torch

from tune2gguf.train.validation_plan import (
    FORWARD_SHARE,
    GENERATION_COSTS,
    MAX_REPLY_TOKENS,
    MAX_SHARE,
    MIN_REPLY_TOKENS,
    GenerationCost,
    ValidationPlan,
    count_validations,
    get_generation_cost,
    plan_validation,
)

CPU, CUDA = GENERATION_COSTS["cpu"], GENERATION_COSTS["cuda"]


def make_digests(count: int) -> list[bytes]:
    return [hashlib.blake2b(str(row).encode(), digest_size=16).digest() for row in range(count)]


def plan(
    num_rows: int, *, train_rows: int, length: int = 100, steps: int = 200, epochs: int = 3, generation=CPU, **given
):
    """Plan for rows of equal length."""
    return plan_validation(
        lengths=np.full(num_rows, length),
        digests=make_digests(num_rows),
        training_tokens=train_rows * epochs * length,
        steps_per_epoch=steps // epochs,
        epochs=epochs,
        generation=generation,
        **given,
    )


def list_steps(found: ValidationPlan, *, steps_per_epoch: int, epochs: int) -> list[int]:
    steps = range(steps_per_epoch * epochs + 1)
    return [step for step in steps if found.is_due(step, is_epoch_end=step % steps_per_epoch == 0)]


@pytest.mark.parametrize("steps_per_epoch", [1, 2, 7, 66])
@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("every", [1, 2, 5, 66, 1000])
def test_counted_validations_are_those_that_come_due(steps_per_epoch, epochs, every):
    found = ValidationPlan(
        rows=[0], num_validation_rows=1, every_n_steps=every, num_validations=0, training_tokens=1.0, share=0.0
    )
    steps = list_steps(found, steps_per_epoch=steps_per_epoch, epochs=epochs)
    assert len(steps) == count_validations(every, steps_per_epoch=steps_per_epoch, epochs=epochs)
    assert {0, *(epoch * steps_per_epoch for epoch in range(1, epochs + 1))} <= set(steps)


@pytest.mark.parametrize("num_rows", [1, 5, 40, 3000])
@pytest.mark.parametrize("train_rows", [200, 1000, 30_000])
def test_by_default_validation_costs_at_most_a_tenth(num_rows, train_rows):
    found = plan(num_rows, train_rows=train_rows)
    cost = FORWARD_SHARE * len(found.rows) * found.num_validations / (3 * train_rows)
    assert found.share == pytest.approx(cost)
    assert 0 < cost <= MAX_SHARE
    # As many rows as fit: one more would be too many.
    assert len(found.rows) == num_rows or cost * (len(found.rows) + 1) / len(found.rows) > MAX_SHARE


def test_long_rows_count_by_their_tokens():
    digests = make_digests(4)
    order = sorted(range(4), key=digests.__getitem__)
    lengths = np.full(4, 10)
    lengths[order[2]] = 1000
    given = {"digests": digests, "training_tokens": 5000, "steps_per_epoch": 10, "epochs": 1, "every_n_steps": 10}
    given["generation"] = CPU
    # Two validations: 0.4 * (10 + 10) * 2 = 16 of 500; with the long row 816.
    assert plan_validation(lengths=lengths, **given).rows == sorted(order[:2])
    assert plan_validation(lengths=np.full(4, 10), **given).rows == [0, 1, 2, 3]


def test_there_are_ten_validations_on_the_way_where_many_rows_fit_and_fewer_before_rows_become_too_few():
    often = plan(40, train_rows=30_000)
    on_the_way = {*range(0, 199, 20), 66, 132, 198}
    assert list_steps(often, steps_per_epoch=66, epochs=3) == sorted(on_the_way)
    # 300 rows three times pay for 225 rows: 32 rows 7 times are 224, the next denser plan has 9 times.
    seldom = plan(40, train_rows=300)
    assert (seldom.num_validations, len(seldom.rows)) == (7, 32)
    # 259 pay for 194: the start and each epoch's end, then with all rows.
    assert plan(40, train_rows=259).rows == list(range(40))
    assert plan(40, train_rows=259, max_rows=40).num_validations == 4
    assert plan(40, train_rows=60).num_validations == 4  # each epoch's end stays


@pytest.mark.parametrize("train_rows", [20, 259])
@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_even_the_shortest_run_is_seen_on_its_way(train_rows, epochs):
    found = plan(40, train_rows=train_rows, steps=65 * epochs, epochs=epochs)
    on_the_way = list_steps(found, steps_per_epoch=65, epochs=epochs)[1:-1]
    assert any(0.2 * 65 * epochs <= step <= 0.7 * 65 * epochs for step in on_the_way)


def test_what_is_asked_for_is_done_whatever_it_costs_and_said():
    found = plan(40, train_rows=259, every_n_steps=10, max_rows=40)
    assert found.rows == list(range(40))
    assert found.num_validations == 1 + 19 + 3
    assert found.share == pytest.approx(0.4 * 40 * 23 / (259 * 3))
    assert found.describe() == "validation: 40 rows, all of them measured 23 times, about 47% of the training time"


@pytest.mark.parametrize("train_rows", [50, 100, 259, 1000])
def test_samples_and_rows_together_cost_at_most_a_tenth(train_rows):
    found = plan(400, train_rows=train_rows, num_samples=3, reply_tokens=30)
    steps = found.max_reply_tokens + 3 * min(30, found.max_reply_tokens)
    assert found.samples_share == pytest.approx(CPU.token * steps / (3 * train_rows * 100))
    assert MIN_REPLY_TOKENS <= found.max_reply_tokens <= MAX_REPLY_TOKENS
    one_more = found.share * (len(found.rows) + 1) / len(found.rows)
    assert found.share + found.samples_share <= MAX_SHARE < one_more + found.samples_share
    assert (train_rows < 259) == (found.max_reply_tokens < MAX_REPLY_TOKENS), "replies are cut where they have to be"
    assert f", and {found.samples_share:.0%} for the samples" in found.describe()
    without = plan(400, train_rows=train_rows, num_samples=0, reply_tokens=30)
    assert (without.samples_share, len(without.rows) > len(found.rows)) == (0, True)


@pytest.mark.parametrize("train_rows", [50, 259, 100_000])
def test_on_a_gpu_replies_cost_more_tokens_and_short_runs_have_whole_ones(train_rows):
    found = plan(400, train_rows=train_rows, num_samples=3, reply_tokens=30, generation=CUDA)
    spent = CUDA.token * (found.max_reply_tokens + 3 * min(30, found.max_reply_tokens))
    assert found.samples_share == pytest.approx(spent / (3 * train_rows * 100))
    assert found.max_reply_tokens == MAX_REPLY_TOKENS
    assert spent <= max(CUDA.always_covered, MAX_SHARE / 2 * 3 * train_rows * 100)
    # Twelve epochs of long replies are more than what is always covered.
    long = plan(400, train_rows=train_rows // 4, num_samples=3, reply_tokens=60, epochs=12, generation=CUDA)
    assert (train_rows < 1000) == (long.max_reply_tokens < MAX_REPLY_TOKENS)


def test_rows_left_out_are_said_with_the_way_to_have_them():
    found = plan(40, train_rows=259, every_n_steps=20)
    assert found.describe() == (
        "validation: 40 rows, 14 of them measured 13 times, about 9% of the training time; all of them: max_val_rows=40"
    )
    assert "no rows" in plan(0, train_rows=259).describe()


def test_a_smaller_choice_is_part_of_a_larger_one_and_does_not_depend_on_the_order_of_the_rows():
    chosen = [set(plan(100, train_rows=1000, max_rows=count).rows) for count in (10, 30, 100)]
    assert chosen[0] < chosen[1] < chosen[2]
    digests = make_digests(100)
    given = {"training_tokens": 10_000, "steps_per_epoch": 10, "epochs": 1, "max_rows": 10, "generation": CPU}
    turned = plan_validation(lengths=np.full(100, 10), digests=digests[::-1], **given)
    assert {99 - row for row in turned.rows} == chosen[0]


def test_generation_of_one_process_costs_what_all_of_them_would_train_meanwhile():
    four = get_generation_cost(torch.device("cuda"), num_processes=4)
    assert four == GenerationCost(4 * CUDA.token, 4 * CUDA.always_covered, 4 * FORWARD_SHARE)
    alone, found = (
        plan(40, train_rows=100_000, num_samples=3, reply_tokens=30, generation=one) for one in (CUDA, four)
    )
    assert found.max_reply_tokens == alone.max_reply_tokens
    assert found.samples_share == pytest.approx(4 * alone.samples_share)
