"""Several sources in one data set: each has its own reading options, split and share of an epoch."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import make_conversations, write_rows
from tune2gguf.data import PreparedData, chat_dataset, check_files, plan_epoch
from tune2gguf.inspect_data import inspect_files
from tune2gguf.tokenizer.tokenizer import load_tokenizer


@pytest.fixture
def files(tmp_path) -> tuple[str, str]:
    """Write 100 conversations, and 50 rows with other columns."""
    chats = write_rows(tmp_path / "chats.jsonl", make_conversations(100))
    pairs = [{"question": f"How much is {number} + 1?", "answer": f"{number + 1}"} for number in range(50)]
    return str(chats), str(write_rows(tmp_path / "pairs.jsonl", pairs))


COLUMNS = {"prompt": "question", "completion": "answer"}


def prepare(tiny_base, sources, *, seed=1, **options) -> PreparedData:
    tokenizer = load_tokenizer(tiny_base, chat_template="chatml")
    return chat_dataset(sources=sources, tokenizer=tokenizer, max_seq_len=1000, seed=seed, **options)


def count_picks(data: PreparedData) -> Counter[tuple[str, int]]:
    return Counter((Path(row.source.file).name, row.source.line) for row in data.train)


def test_each_source_has_its_own_columns_and_split_and_the_ledger_says_what_it_gave(tiny_base, files):
    chats, pairs = files
    sources = [{"files": [chats], "validation_split": 0.2}, {"files": pairs, "columns": COLUMNS}]
    ledger = prepare(tiny_base, sources).ledger
    first, second = ledger["sources"]
    assert (first["files"], second["files"]) == ([chats], [pairs])
    assert (first["read"], second["read"]) == (100, 50)
    assert first["validated"] == ledger["validated"] > 0 and second["validated"] == 0
    assert first["trained"] + first["validated"] == 100
    assert first["rows_per_epoch"] + second["rows_per_epoch"] == ledger["training"]["rows"]
    assert first["tokens_per_epoch"] + second["tokens_per_epoch"] == ledger["training"]["tokens"]
    assert [file["format"] for file in ledger["files"]] == ["openai", "prompt_completion"]


def test_what_a_source_does_not_say_it_has_from_the_data_set(tiny_base, files):
    chats, pairs = files
    sources = [{"files": chats, "format": "openai"}, {"files": pairs, "validation_split": 0}]
    ledger = prepare(tiny_base, sources, validation_split=0.2, columns=COLUMNS).ledger
    assert [source["validated"] > 0 for source in ledger["sources"]] == [True, False]


@pytest.mark.parametrize(
    ("share", "rows", "counts"),
    [
        ({"weight": 1}, 50, {1}),
        ({"weight": 2}, 100, {2}),
        ({"weight": 0.5}, 25, {1}),
        ({"weight": 1.5}, 75, {1, 2}),
        ({"rows": 10}, 10, {1}),
        ({"rows": 50}, 50, {1}),
        ({"rows": 120}, 120, {2, 3}),
    ],
)
def test_an_epoch_takes_as_many_rows_of_a_source_as_its_share_says(tiny_base, files, share, rows, counts):
    chats, pairs = files
    data = prepare(tiny_base, [{"files": chats}, {"files": pairs, "columns": COLUMNS, **share}])
    picks = count_picks(data)
    assert sum(count for (name, _), count in picks.items() if name == "pairs.jsonl") == rows
    assert {count for (name, _), count in picks.items() if name == "pairs.jsonl"} == counts
    assert {count for (name, _), count in picks.items() if name == "chats.jsonl"} == {1}
    ledger = data.ledger
    assert ledger["sources"][1]["rows_per_epoch"] == rows
    assert ledger["not_drawn"] == len(ledger["files"][1]["lines_not_drawn"]) == max(0, 50 - rows)
    assert (
        ledger["read"]
        == 150
        == sum(ledger[part] for part in ("trained", "validated", "truncated", "dropped", "not_drawn"))
    )
    drawn = {line for name, line in picks if name == "pairs.jsonl"}
    assert drawn.isdisjoint(ledger["files"][1]["lines_not_drawn"])


def test_epoch_of_a_run_is_all_that_the_sources_give_once(tiny_base, files):
    chats, pairs = files
    data = prepare(tiny_base, [{"files": chats, "weight": 0.5}, {"files": pairs, "columns": COLUMNS, "weight": 3}])
    steps = plan_epoch(data.sequence_lengths, seed=1, epoch=0, rows_per_step=8)
    assert sorted(row for step in steps for row in step) == [*range(50 + 150)]


def test_share_depends_on_seed_and_rows_only(tiny_base, files):
    chats, pairs = files

    def draw(seed, order=1):
        sources = [{"files": chats, "rows": 30}, {"files": pairs, "columns": COLUMNS}][::order]
        data = prepare(tiny_base, sources, seed=seed)
        return {pick for pick in count_picks(data) if pick[0] == "chats.jsonl"}

    assert draw(1) == draw(1) == draw(1, order=-1)
    assert draw(1) != draw(2)


def test_most_of_a_drawn_share_stays_when_rows_are_added(tiny_base, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", make_conversations(200))
    before = set(count_picks(prepare(tiny_base, [{"files": str(path), "rows": 50}])))
    write_rows(path, make_conversations(220))
    after = set(count_picks(prepare(tiny_base, [{"files": str(path), "rows": 50}])))
    # The lowest 50 of 220 draws are the lowest 50 of 200, except for the new ones among them.
    assert after - before <= {("a.jsonl", line) for line in range(201, 221)}


def test_held_out_rows_are_never_repeated_or_left_out(tiny_base, files):
    chats, pairs = files
    for share in ({"weight": 3}, {"weight": 0.1}):
        data = prepare(
            tiny_base, [{"files": chats, "validation_split": 0.2, **share}, {"files": pairs, "columns": COLUMNS}]
        )
        plain = prepare(tiny_base, [{"files": chats, "validation_split": 0.2}, {"files": pairs, "columns": COLUMNS}])
        lines = [row.source.line for row in data.validation]
        assert lines == [row.source.line for row in plain.validation] and len(set(lines)) == len(lines)


def test_row_that_stands_in_two_sources_is_a_repeated_row(tiny_base, files, tmp_path):
    chats, _ = files
    other = write_rows(tmp_path / "other.jsonl", make_conversations(1, start=7))
    with pytest.raises(ValueError, match=r"other\.jsonl, line 1: repeats .*chats\.jsonl, line 8"):
        prepare(tiny_base, [{"files": chats}, {"files": str(other)}])


def test_validation_files_of_any_source_keep_their_rows_from_the_training_of_all(tiny_base, files, tmp_path):
    chats, pairs = files
    heldout = write_rows(tmp_path / "heldout.jsonl", make_conversations(1, start=7))
    sources = [{"files": chats}, {"files": pairs, "columns": COLUMNS, "validation_files": str(heldout)}]
    with pytest.raises(ValueError, match="fit"):  # the source's columns hold for its validation files, too
        prepare(tiny_base, sources)
    sources = [{"files": pairs, "columns": COLUMNS}, {"files": chats, "validation_files": [str(heldout)]}]
    with pytest.raises(ValueError, match=r"chats\.jsonl, line 8: is in both training and validation"):
        prepare(tiny_base, sources)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sources": []}, r"dataset\.sources=\[\] must be a list of sources"),
        ({"sources": ["a.jsonl"]}, "must be a list of sources"),
        ({"sources": [{"fles": "{file}"}]}, r"unknown key 'fles' in dataset\.sources\[0\]; did you mean 'files'\?"),
        ({"sources": [{}]}, r"dataset\.sources\[0\]\.files=None names no file"),
        ({"sources": [{"files": "{file}"}], "files": "{file}"}, "are both given; set dataset.files=null"),
        ({"sources": [{"files": "missing.jsonl"}]}, "missing.jsonl: no such file"),
        ({"sources": [{"files": "{file}", "weight": 0}]}, r"sources\[0\]\.weight=0 must be above 0"),
        ({"sources": [{"files": "{file}", "weight": float("nan")}]}, "weight=nan must be above 0"),
        ({"sources": [{"files": "{file}", "rows": 0}]}, r"sources\[0\]\.rows=0 must be a whole number of at least 1"),
        ({"sources": [{"files": "{file}", "rows": 1.5}]}, r"rows=1\.5 must be a whole number"),
        ({"sources": [{"files": "{file}", "rows": 1, "weight": 1}]}, "are both given; keep one of them"),
        (
            {"sources": [{"files": "{file}", "validation_split": 2}]},
            r"sources\[0\]\.validation_split=2 must be a fract",
        ),
        ({"sources": [{"files": "{file}", "format": "chat"}]}, r"sources\[0\]\.format=chat is not one of auto, openai"),
    ],
)
def test_wrong_source_is_named_before_a_row_is_read(files, options, said):
    def fill(value):
        if isinstance(value, list):
            return [fill(one) for one in value]
        if isinstance(value, dict):
            return {key: fill(one) for key, one in value.items()}
        return files[0] if value == "{file}" else value

    problems = check_files(fill(options))
    assert any(re.search(said, problem) for problem in problems)


def test_inspection_shows_what_each_source_gives(tiny_base, files, tmp_path):
    chats, pairs = files
    second = f"{{files: {pairs}, columns: {{prompt: question, completion: answer}}, weight: 2}}"
    argument = f"dataset.sources=[{{files: {chats}}}, {second}]"
    inspection = inspect_files([argument], tiny_base, chat_template="chatml", max_seq_len=500, num_rows=0)
    text = inspection.format(colored=False)
    assert f"{pairs}: 50 rows, prompt_completion\n  prompt = column 'question', completion = column 'answer'" in text
    assert f"source 1, {pairs}: 50 read, 50 trained, 0 validated; an epoch takes 100 rows" in text
    shares = [float(share) for share in re.findall(r"([\d.]+)% of its tokens", text)]
    assert np.isclose(sum(shares), 100, atol=0.2)
