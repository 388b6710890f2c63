"""Packs: every row once, nearly full, the same for a seed; attention stays within a row."""

import numpy as np
import pytest
import torch

from tune2gguf.data import Pack, Source, TokenizedRow, TokenizedRows, collate
from tune2gguf.data.columns import RowReader
from tune2gguf.data.packing import pack_rows
from tune2gguf.data.tokenize import TokenIndex, TokenizedFile
from tune2gguf.model.llama import make_row_mask


def make_rows(lengths: list[int] | np.ndarray, max_seq_len: int) -> TokenizedRows:
    lengths = np.asarray(lengths, np.int64)
    index = TokenIndex(
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        lines=np.arange(1, len(lengths) + 1),
        num_supervised=lengths - 1,
        first_supervised=np.ones(len(lengths), np.int64),
        digests=np.zeros((len(lengths), 16), np.uint8),
        problems=[],
        num_characters=0,
        num_text_tokens=0,
        role_counts={},
        unit="line",
        lines_that_spell_special=[],
        format="text",
        absent_columns={},
        num_ended=0,
        num_stripped=0,
        has_tools=np.zeros(len(lengths), bool),
        lines_written_otherwise=[],
        unused_keys={},
        system_prompts=[],
        system_numbers=np.zeros(len(lengths), np.int64),
    )
    tokens = np.arange(lengths.sum(), dtype=np.int32)
    file = TokenizedFile("x.jsonl", RowReader(), tokens, np.ones(len(tokens), bool), index)
    picks = np.stack(
        [np.zeros(len(lengths), np.int64), np.arange(len(lengths)), np.zeros(len(lengths), np.int64)], axis=1
    )
    return TokenizedRows([file], picks, max_seq_len)


def draw_lengths(count: int) -> np.ndarray:
    """Return lengths like those of chat data sets: log-normal, median 200 tokens, some cut at 2048."""
    return np.clip(np.random.default_rng(0).lognormal(5.3, 0.9, count).astype(int), 20, 4000)


def test_every_row_stands_in_one_pack_and_no_pack_overflows():
    rows = make_rows(draw_lengths(3000), 2048)
    packed = pack_rows(rows, seed=1)
    assert sorted(row for pack in packed.packs for row in pack) == list(range(3000))
    assert max(len(pack.tokens) for pack in packed) <= 2048


@pytest.mark.parametrize("count", [300, 3000, 30_000])
def test_packs_of_mixed_lengths_are_filled_to_97_percent(count):
    packed = pack_rows(make_rows(draw_lengths(count), 2048), seed=1)
    assert packed.fill >= 0.97
    # Computed from the packs: all but the least filled one.
    filled = sorted(len(pack.tokens) for pack in packed)[1:]
    assert packed.fill == pytest.approx(np.mean(filled) / 2048)


def test_packs_depend_on_the_seed_only():
    rows = make_rows([10, 10, 10, 10, 5, 5, 3], 20)
    assert pack_rows(rows, seed=1).packs == pack_rows(rows, seed=1).packs
    assert pack_rows(rows, seed=1).packs != pack_rows(rows, seed=2).packs


def test_best_fit_fills_the_gap_that_fits_exactly():
    packed = pack_rows(make_rows([8, 7, 3, 2], 10), seed=0)
    assert sorted(sorted(pack) for pack in packed.packs) == [[0, 3], [1, 2]]


def make_row(tokens: list[int], supervised: list[int]) -> TokenizedRow:
    return TokenizedRow(np.array(tokens, np.int32), np.array(supervised, bool), Source("x.jsonl", tokens[0]))


def test_pack_is_one_long_row_in_which_no_row_predicts_the_next_ones_first_token():
    pack = Pack((make_row([1, 2, 3], [0, 1, 1]), make_row([4, 5], [1, 1])))
    assert pack.tokens.tolist() == [1, 2, 3, 4, 5]
    assert pack.supervised.tolist() == [False, True, True, False, True]
    assert pack.num_supervised == 3
    assert pack.source == "x.jsonl, line 1 + x.jsonl, line 4"


def test_attention_is_causal_within_a_row():
    mask = make_row_mask(torch.tensor([0, 2, 3], dtype=torch.int32), 1, 3)
    assert mask[0].int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]


def test_packs_and_rows_are_collated_alike():
    rows = [make_row([1, 2, 3], [0, 1, 1]), make_row([4, 5], [0, 1]), make_row([6, 7], [0, 1])]
    packed, alone = collate([Pack((rows[0], rows[1])), Pack((rows[2],))]), collate(rows)
    assert packed.tokens.tolist() == alone.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert packed.row_starts.tolist() == alone.row_starts.tolist() == [0, 3, 5, 7]
    assert packed.labels.tolist() == alone.labels.tolist() == [[-100, 2, 3, -100, 5, -100, 7]]
