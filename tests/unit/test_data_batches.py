"""Which rows a step takes: every row once an epoch, the same rows however a step is cut."""

import numpy as np
import pytest
import torch

from tune2gguf.data import Source, TokenizedRow, collate, plan_epoch


def list_step_rows(
    num_rows: int, *, batch_size: int, accumulation_steps: int, world_size: int, **plan
) -> list[list[int]]:
    """Return the rows of each step over all ranks."""
    ranks = [
        plan_epoch(
            num_rows,
            batch_size=batch_size,
            accumulation_steps=accumulation_steps,
            world_size=world_size,
            rank=rank,
            **plan,
        )
        for rank in range(world_size)
    ]
    assert len({len(steps) for steps in ranks}) == 1
    return [[row for step in steps for batch in step for row in batch] for steps in zip(*ranks, strict=True)]


@pytest.mark.parametrize("num_rows", [1, 7, 8, 9, 61, 64])
@pytest.mark.parametrize("cut", [(8, 1, 1), (1, 8, 1), (4, 2, 1), (2, 2, 2), (1, 1, 8), (1, 2, 4)])
def test_a_step_takes_the_same_rows_however_it_is_cut(num_rows, cut):
    batch_size, accumulation_steps, world_size = cut
    plan = {"seed": 42, "epoch": 3}
    found = list_step_rows(
        num_rows, batch_size=batch_size, accumulation_steps=accumulation_steps, world_size=world_size, **plan
    )
    whole = list_step_rows(num_rows, batch_size=8, accumulation_steps=1, world_size=1, **plan)
    assert [sorted(rows) for rows in found] == [sorted(rows) for rows in whole]
    assert sorted(row for rows in found for row in rows) == list(range(num_rows))


LENGTHS = np.random.default_rng(0).lognormal(5, 1, 1000).astype(np.int64)


@pytest.mark.parametrize("num_rows", [5, 8, 333, 1000])
@pytest.mark.parametrize("cut", [(8, 1, 1), (2, 2, 2), (1, 2, 4)])
def test_grouping_by_length_keeps_the_rows_of_a_step_however_it_is_cut(num_rows, cut):
    batch_size, accumulation_steps, world_size = cut
    plan = {"seed": 42, "epoch": 3, "lengths": LENGTHS[:num_rows]}
    found = list_step_rows(
        num_rows, batch_size=batch_size, accumulation_steps=accumulation_steps, world_size=world_size, **plan
    )
    whole = list_step_rows(num_rows, batch_size=8, accumulation_steps=1, world_size=1, **plan)
    assert [sorted(rows) for rows in found] == [sorted(rows) for rows in whole]
    assert sorted(row for rows in found for row in rows) == list(range(num_rows))


def test_grouping_by_length_depends_on_seed_and_epoch():
    plans = [
        plan_epoch(333, seed=seed, epoch=epoch, batch_size=4, lengths=LENGTHS[:333])
        for seed, epoch in [(1, 0), (1, 0), (1, 1), (2, 0)]
    ]
    assert plans[0] == plans[1]
    assert plans[0] != plans[2] and plans[0] != plans[3] and plans[2] != plans[3]


def count_padded(steps: list[list[list[int]]]) -> int:
    return sum(len(batch) * int(LENGTHS[batch].max()) for step in steps for batch in step)


@pytest.mark.parametrize(("batch_size", "accumulation_steps", "at_most"), [(2, 4, 1.05), (4, 2, 1.15), (8, 1, 1.35)])
def test_grouping_by_length_leaves_little_padding(batch_size, accumulation_steps, at_most):
    options = {"seed": 0, "epoch": 0, "batch_size": batch_size, "accumulation_steps": accumulation_steps}
    grouped = count_padded(plan_epoch(1000, lengths=LENGTHS, **options))
    shuffled = count_padded(plan_epoch(1000, **options))
    assert grouped / LENGTHS.sum() < at_most
    assert shuffled / grouped > 1.4


def test_grouping_does_not_order_the_epoch_by_length():
    steps = plan_epoch(1000, seed=0, epoch=0, batch_size=8, lengths=LENGTHS)
    means = [LENGTHS[step[0]].mean() for step in steps]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3


def test_ranks_get_like_lengths_in_the_same_micro_batch():
    ranks = [
        plan_epoch(1000, seed=0, epoch=0, batch_size=2, accumulation_steps=2, world_size=2, rank=rank, lengths=LENGTHS)
        for rank in range(2)
    ]
    totals = [np.array([LENGTHS[batch].sum() for step in steps for batch in step]) for steps in ranks]
    assert np.abs(totals[0] - totals[1]).sum() < 0.1 * totals[0].sum()


def test_order_depends_on_seed_and_epoch_and_repeats_for_the_same():
    def plan(seed, epoch):
        return plan_epoch(50, seed=seed, epoch=epoch, batch_size=4)

    assert plan(1, 0) == plan(1, 0)
    assert plan(1, 0) != plan(1, 1)
    assert plan(1, 0) != plan(2, 0)
    assert plan(1, 2) != plan(2, 1)


def test_the_tail_is_shared_as_evenly_as_possible_and_a_rank_may_have_none():
    def tail(num_rows, rank):
        return plan_epoch(num_rows, seed=0, epoch=0, batch_size=2, accumulation_steps=2, world_size=4, rank=rank)[-1]

    sizes = [sum(map(len, tail(16 + 6, rank))) for rank in range(4)]
    assert sizes == [2, 2, 1, 1]
    assert [tail(16 + 3, rank) == [] for rank in range(4)] == [False, False, False, True]


def test_micro_batches_hold_at_most_batch_size_rows():
    steps = plan_epoch(23, seed=0, epoch=0, batch_size=3, accumulation_steps=2)
    assert [[len(batch) for batch in step] for step in steps] == [[3, 3], [3, 3], [3, 3], [3, 2]]


def make_row(tokens: list[int], supervised: list[int]) -> TokenizedRow:
    return TokenizedRow(np.array(tokens, np.int32), np.array(supervised, bool), Source("x.jsonl", 1))


def test_batch_is_padded_on_the_right_and_labels_only_supervised_tokens():
    batch = collate([make_row([5, 6, 7], [0, 1, 1]), make_row([8, 9], [0, 1])], pad_id=1)
    assert batch.tokens.tolist() == [[5, 6, 7], [8, 9, 1]]
    assert batch.labels.tolist() == [[-100, 6, 7], [-100, 9, -100]]
    assert batch.supervised.tolist() == [0, 1, 3]
    assert batch.tokens.dtype == batch.labels.dtype == batch.supervised.dtype == torch.int64


def test_first_token_does_not_count_as_supervised_because_nothing_predicts_it():
    assert make_row([5, 6, 7], [1, 0, 1]).num_supervised == 1
