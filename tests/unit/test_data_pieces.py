"""Long texts in pieces: every token is trained once, and the ledger accounts for each text."""

import json
from itertools import pairwise

import numpy as np
import pytest

from tests.conftest import SENTENCES, make_conversations, write_rows
from tune2gguf.data import PreparedData, chat_dataset, check_files
from tune2gguf.export.measure.validation_set import make_rows
from tune2gguf.inspect_data import inspect_files
from tune2gguf.runs.files import VALIDATION_FILE
from tune2gguf.runs.validation_rows import format_validation_rows, read_validation_rows
from tune2gguf.tokenizer.tokenizer import ChatTokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_base) -> ChatTokenizer:
    return load_tokenizer(tiny_base, chat_template="chatml")


def write_texts(path, *counts: int):
    """Write texts with these numbers of sentences."""
    return write_rows(path, [{"text": " ".join([f"Log {count}.", *(SENTENCES * count)[:count]])} for count in counts])


def prepare(path, tokenizer, *, max_seq_len=40, **options) -> PreparedData:
    options = {"on_long_row": "split"} | options
    return chat_dataset(str(path), tokenizer=tokenizer, max_seq_len=max_seq_len, seed=1, **options)


@pytest.mark.parametrize("overlap", [1, 2, 7, 39])
def test_pieces_hold_every_token_and_train_each_once(tmp_path, tokenizer, overlap):
    path = write_texts(tmp_path / "a.jsonl", 1, 9, 17)
    whole = prepare(path, tokenizer, max_seq_len=10_000)
    pieces = prepare(path, tokenizer, long_row_overlap=overlap)
    for row in whole.train:
        own = [piece for piece in pieces.train if piece.source == row.source]
        joined = np.concatenate([own[0].tokens, *(piece.tokens[overlap:] for piece in own[1:])])
        assert joined.tolist() == row.tokens.tolist()
        assert all(len(piece.tokens) == 40 for piece in own[:-1]) and len(own[-1].tokens) <= 40
        assert sum(piece.num_supervised for piece in own) == row.num_supervised
        assert all(piece.num_supervised > 0 for piece in own)
        for before, after in pairwise(own):
            assert after.tokens[:overlap].tolist() == before.tokens[-overlap:].tolist()


def test_no_piece_is_without_a_token_to_train_whatever_the_limit(tmp_path, tokenizer):
    path = write_texts(tmp_path / "a.jsonl", 9)
    length = len(prepare(path, tokenizer, max_seq_len=10_000).train[0].tokens)
    for max_seq_len in range(2, 60):
        data = prepare(path, tokenizer, max_seq_len=max_seq_len)
        assert all(row.num_supervised > 0 for row in data.train)
        assert data.ledger["training"]["supervised_tokens"] == length - 1


def test_ledger_counts_a_split_text_as_a_row_and_lists_its_pieces(tmp_path, tokenizer):
    path = write_texts(tmp_path / "a.jsonl", 1, 9, 17)
    data = prepare(path, tokenizer)
    ledger = data.ledger
    assert (ledger["read"], ledger["trained"], ledger["truncated"], ledger["dropped"]) == (3, 3, 0, 0)
    assert [row["line"] for row in ledger["rows_split"]] == [2, 3]
    assert sum(row["pieces"] for row in ledger["rows_split"]) == len(data.train) - 1 == ledger["training"]["rows"] - 1
    for row in ledger["rows_split"]:
        # ceil((tokens - overlap) / stride)
        assert row["pieces"] == -(-(row["tokens"] - 1) // 39)
    assert ledger["training"]["tokens"] == sum(len(row.tokens) for row in data.train)
    assert ledger["training"]["supervised_tokens"] == sum(row.num_supervised for row in data.train)
    assert data.train.lengths().tolist() == [len(row.tokens) for row in data.train]
    assert any("texts longer than max_seq_len=40, split: 2, into" in note for note in ledger["notes"])
    assert json.loads(json.dumps(ledger)) == ledger


def test_inspection_says_how_many_texts_are_split(tmp_path, tiny_base):
    path = str(write_texts(tmp_path / "a.jsonl", 1, 9, 17))
    options = {"chat_template": "chatml", "max_seq_len": 40, "num_rows": 0}
    split = inspect_files([path, "dataset.on_long_row=split"], tiny_base, **options).format(colored=False)
    assert "max_seq_len=40 cuts 0 rows and splits 2 texts;" in split
    assert "max_seq_len=40 cuts 2 rows;" in inspect_files([path], tiny_base, **options).format(colored=False)


def test_conversations_are_truncated_and_said_so(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", make_conversations(4))
    ledger = prepare(path, tokenizer, max_seq_len=50).ledger
    assert ledger["truncated"] == 4 and ledger["rows_split"] == []


def test_without_split_the_rest_of_a_text_is_cut_and_said_so(tmp_path, tokenizer):
    ledger = prepare(write_texts(tmp_path / "a.jsonl", 9), tokenizer, on_long_row="truncate").ledger
    assert ledger["truncated"] == 1 and ledger["training"]["tokens"] == 40


def test_pieces_of_a_text_stand_on_one_side(tmp_path, tokenizer):
    path = write_texts(tmp_path / "a.jsonl", *range(5, 40))
    data = prepare(path, tokenizer, validation_split=0.3)
    sides = [{row.source.line for row in rows} for rows in (data.train, data.validation)]
    assert sides[0].isdisjoint(sides[1]) and len(sides[0] | sides[1]) == 35 and sides[1]


def test_held_out_pieces_are_read_back_as_they_are_validated(tmp_path, tokenizer):
    path = write_texts(tmp_path / "a.jsonl", *range(5, 20))
    data = prepare(path, tokenizer, validation_split=0.3, long_row_overlap=3)
    assert len(data.validation) > len({row.source.line for row in data.validation})
    assert len(set(data.validation.digests())) == len(data.validation)
    (tmp_path / VALIDATION_FILE).write_text(format_validation_rows(data.validation))
    rows = make_rows(read_validation_rows(tmp_path), tokenizer, max_seq_len=40)
    for row, expected in zip(rows, data.validation, strict=True):
        assert row.tokens.tolist() == expected.tokens.tolist()
        assert len(row.positions) == expected.num_supervised


def test_pieces_are_packed_as_rows_are(tmp_path, tokenizer):
    data = prepare(write_texts(tmp_path / "a.jsonl", 1, 9, 17), tokenizer, packing=True)
    assert sorted(row for pack in data.sequences.packs for row in pack) == [*range(len(data.train))]
    assert sum(pack.num_supervised for pack in data.sequences) == data.ledger["training"]["supervised_tokens"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"long_row_overlap": 0}, "dataset.long_row_overlap=0 must be a whole number of at least 1"),
        ({"long_row_overlap": 1.5}, "dataset.long_row_overlap=1.5 must be a whole number"),
        ({"long_row_overlap": 5, "on_long_row": "drop"}, "has no effect without dataset.on_long_row=split"),
    ],
)
def test_wrong_overlap_is_refused(tmp_path, options, said):
    path = write_texts(tmp_path / "a.jsonl", 1)
    [problem] = check_files({"files": [str(path)], "on_long_row": "split", **options})
    assert said in problem


def test_overlap_that_leaves_no_room_is_refused(tmp_path, tokenizer):
    path = write_texts(tmp_path / "a.jsonl", 9)
    with pytest.raises(ValueError, match="long_row_overlap=40 must be below max_seq_len=40"):
        prepare(path, tokenizer, long_row_overlap=40)


def test_fingerprint_tells_pieces_from_other_pieces(tmp_path, tokenizer):
    path = write_texts(tmp_path / "a.jsonl", 9)
    prints = [
        prepare(path, tokenizer, **options).ledger["fingerprint"]
        for options in ({}, {"long_row_overlap": 2}, {"on_long_row": "truncate"})
    ]
    assert len(set(prints)) == 3
