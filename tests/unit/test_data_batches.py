"""Batches: every row once per epoch, and the same rows per step for any number of ranks and passes."""

import numpy as np
import pytest
import torch

from tune2gguf.data import Source, TokenizedRow, collate, count_step_tokens, lay_out_passes, plan_epoch

LENGTHS = np.random.default_rng(0).lognormal(5, 1, 1000).astype(np.int64)


@pytest.mark.parametrize("num_rows", [1, 7, 8, 9, 61, 64])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_a_step_takes_the_same_rows_on_any_number_of_ranks(num_rows, world_size):
    plan = {"seed": 42, "epoch": 3, "rows_per_step": 8}
    whole = plan_epoch(LENGTHS[:num_rows], **plan)
    ranks = [plan_epoch(LENGTHS[:num_rows], **plan, world_size=world_size, rank=rank) for rank in range(world_size)]
    for step, shares in zip(whole, zip(*ranks, strict=True), strict=True):
        assert sorted(row for share in shares for row in share) == sorted(step)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert sorted(row for step in whole for row in step) == list(range(num_rows))


def test_ranks_get_about_the_same_work():
    ranks = [plan_epoch(LENGTHS, seed=0, epoch=0, rows_per_step=16, world_size=2, rank=rank) for rank in range(2)]
    totals = [np.array([LENGTHS[rows].sum() for rows in steps]) for steps in ranks]
    assert np.abs(totals[0] - totals[1]).sum() < 0.05 * totals[0].sum()
    # Negative control: the first and the second half of a step, unbalanced.
    whole = plan_epoch(LENGTHS, seed=0, epoch=0, rows_per_step=16)
    halves = [np.array([LENGTHS[rows[part]].sum() for rows in whole]) for part in (slice(8), slice(8, None))]
    assert np.abs(halves[0] - halves[1]).sum() > 0.25 * halves[0].sum()


def test_order_depends_on_seed_and_epoch_and_repeats_for_the_same():
    def plan(seed, epoch):
        return plan_epoch(LENGTHS[:50], seed=seed, epoch=epoch, rows_per_step=4)

    assert plan(1, 0) == plan(1, 0)
    assert plan(1, 0) != plan(1, 1)
    assert plan(1, 0) != plan(2, 0)
    assert plan(1, 2) != plan(2, 1)


def test_the_order_of_an_epoch_has_nothing_to_do_with_length():
    steps = plan_epoch(LENGTHS, seed=0, epoch=0, rows_per_step=8)
    within = np.mean([np.log(LENGTHS[step]).std() for step in steps])
    assert within > 0.85 * np.log(LENGTHS).std()


def test_a_rank_may_have_no_row_of_the_tail():
    tails = [
        plan_epoch(LENGTHS[:19], seed=0, epoch=0, rows_per_step=16, world_size=4, rank=rank)[-1] for rank in range(4)
    ]
    assert sorted(map(len, tails)) == [0, 1, 1, 1]


@pytest.mark.parametrize("tokens_per_pass", [1, 100, 700, 10_000])
def test_passes_hold_every_row_once_and_no_more_tokens_than_they_may(tokens_per_pass):
    lengths = LENGTHS[:100].tolist()
    passes = lay_out_passes(lengths, tokens_per_pass=tokens_per_pass)
    assert sorted(row for rows in passes for row in rows) == list(range(100))
    for rows in passes:
        assert rows == sorted(rows)
        assert sum(lengths[row] for row in rows) <= tokens_per_pass or len(rows) == 1


def test_passes_are_few():
    lengths = LENGTHS.tolist()
    passes = lay_out_passes(lengths, tokens_per_pass=2048)
    least = sum(max(1, length / 2048) for length in lengths if length > 2048)
    least += sum(length for length in lengths if length <= 2048) / 2048
    assert len(passes) < 1.03 * least + 1
    assert lay_out_passes(lengths[:8], tokens_per_pass=10**9) == [[*range(8)]]


def make_row(tokens: list[int], supervised: list[int]) -> TokenizedRow:
    return TokenizedRow(np.array(tokens, np.int32), np.array(supervised, bool), Source("x.jsonl", 1))


def test_batch_holds_rows_one_behind_the_other_and_labels_only_supervised_tokens():
    batch = collate([make_row([5, 6, 7], [0, 1, 1]), make_row([8, 9], [1, 1])])
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9]]
    # A row's first token has no token of its own row before it.
    assert batch.labels.tolist() == [[-100, 6, 7, -100, 9]]
    assert batch.supervised.tolist() == [0, 1, 3]
    assert (batch.row_starts.tolist(), batch.longest_row) == ([0, 3, 5], 3)
    assert batch.input_pos.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.tokens.dtype == batch.labels.dtype == batch.supervised.dtype == batch.input_pos.dtype == torch.int64


def test_a_single_row_needs_no_bounds():
    batch = collate([make_row([5, 6, 7], [0, 1, 1])])
    assert (batch.row_starts, batch.longest_row, batch.input_pos) == (None, None, None)
    assert batch.supervised.tolist() == [0, 1]


def test_first_token_does_not_count_as_supervised_because_nothing_predicts_it():
    assert make_row([5, 6, 7], [1, 0, 1]).num_supervised == 1


def test_steps_of_all_epochs_are_counted_unless_the_data_set_is_large():
    def plan(epoch: int) -> list[list[int]]:
        return plan_epoch(lengths, seed=0, epoch=epoch, rows_per_step=4)

    lengths = LENGTHS[:50]
    found = count_step_tokens(lengths, plan, epochs=3)
    assert found == [int(lengths[rows].sum()) for epoch in range(3) for rows in plan(epoch)]
    assert max(found) > max(found[: len(plan(0))]), "a later epoch has the longest step"
    lengths = np.ones(60_000, dtype=np.int64)
    assert len(count_step_tokens(lengths, plan, epochs=3)) == 15_000
