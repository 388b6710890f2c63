"""Data preparation: every row is trained, validated, truncated or dropped, and data.json says which."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import make_conversations, write_rows
from tune2gguf.data import PreparedData, chat_dataset, check_files
from tune2gguf.runs.validation_rows import format_validation_rows
from tune2gguf.tokenizer.tokenizer import ChatTokenizer, load_tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    """Use a cache of the test's own: the file with a 10 MB row is large enough to be cached."""
    monkeypatch.setenv("TUNE2GGUF_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer(tiny_base) -> ChatTokenizer:
    return load_tokenizer(tiny_base, chat_template="chatml")


def converse(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def list_lines(rows) -> list[tuple[str, int]]:
    return [(Path(row.source.file).name, row.source.line) for row in rows]


# Line of the file -> content and the reason that data.json must give. Lines 1, 2 and 18 are good.
BAD_LINES = {
    3: (b'{"messages": [', "malformed JSON"),
    4: (b'{"messages": [{"role": "user", "content": 3}]}', "'content' must be text, got int 3"),
    5: (json.dumps(converse("Hi", "")).encode(), "message 2 (assistant) is empty"),
    6: (
        json.dumps({"messages": converse("Hi", "x")["messages"][::-1]}).encode(),
        "message 1 has role 'assistant', expected 'user'",
    ),
    7: (json.dumps({"messages": converse("Hi", "x")["messages"][:1]}).encode(), "no message has role 'assistant'"),
    8: (json.dumps(converse("long " * 100, "behind")).encode(), "its supervised tokens begin after"),
    9: (json.dumps(make_conversations(1)[0]).encode(), "repeats {path}, line 1"),
    10: (json.dumps(make_conversations(1, start=70)[0]).encode(), "is in both training and validation"),
    11: (b'{"messages": "\xff"}', "invalid UTF-8 at byte 14"),
    12: (json.dumps(converse("a\0b", "x")).encode(), "NUL byte"),
    13: (json.dumps(converse("a" * 10_000_000, "x")).encode(), "the row is 9.5 MiB long"),
    14: (
        b'{"prompt": "Hi", "completion": "x"}',
        "the row has format prompt_completion, but the file has openai since line 1",
    ),
    15: (
        json.dumps({"messages": [{"role": "tool", "content": "x"}]}).encode(),
        "has role 'tool', but no call before it lacks a result",
    ),
    16: (b"[]", "a row must be a JSON object, got a list"),
    17: (b'{"question": "Hi"}', "fit no format"),
}


@pytest.fixture
def bad_file(tmp_path) -> Path:
    good = [json.dumps(row).encode() for row in make_conversations(3)]
    lines = [*good[:2], *(content for content, _ in BAD_LINES.values()), good[2]]
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join(lines))
    return tmp_path / "bad.jsonl"


def prepare_bad(bad_file: Path, tokenizer: ChatTokenizer, **options) -> PreparedData:
    heldout = write_rows(bad_file.with_name("heldout.jsonl"), make_conversations(2, start=70))
    return chat_dataset(
        [str(bad_file)], tokenizer=tokenizer, max_seq_len=120, seed=1, validation_files=[str(heldout)], **options
    )


def test_every_kind_of_bad_row_is_an_error_that_names_its_line(bad_file, tokenizer):
    with pytest.raises(ValueError) as error:
        prepare_bad(bad_file, tokenizer)
    *rows, way_out, longer = str(error.value).splitlines()
    assert {int(row.split(", line ")[1].split(":")[0]) for row in rows} == BAD_LINES.keys()
    assert way_out.endswith("dataset.on_bad_row=drop")
    assert longer.startswith("Raise max_seq_len")


def test_ledger_accounts_for_a_file_with_every_kind_of_bad_row(bad_file, tokenizer):
    data = prepare_bad(bad_file, tokenizer, on_bad_row="drop")
    ledger = data.ledger
    assert list_lines(data.train) == [("bad.jsonl", 1), ("bad.jsonl", 2), ("bad.jsonl", 18)]
    assert ledger["read"] == 18 + 2
    assert ledger["read"] == ledger["trained"] + ledger["validated"] + ledger["truncated"] + ledger["dropped"]
    assert (ledger["trained"], ledger["validated"], ledger["dropped"]) == (3, 2, len(BAD_LINES))
    reasons = {row["line"]: row["reason"] for row in ledger["rows_dropped"]}
    assert {row["file"] for row in ledger["rows_dropped"]} == {str(bad_file)}
    assert reasons.keys() == BAD_LINES.keys()
    for line, (_, reason) in BAD_LINES.items():
        assert reason.format(path=bad_file) in reasons[line]
    assert json.loads(json.dumps(ledger)) == ledger


@pytest.mark.parametrize("line", [8, 9, 10])
def test_rows_that_only_comparison_or_token_count_shows_are_errors_too(bad_file, tokenizer, line):
    lines = bad_file.read_bytes().split(b"\n")
    bad_file.write_bytes(b"\n".join([lines[0], lines[1], lines[line - 1]]))
    with pytest.raises(ValueError, match=BAD_LINES[line][1].format(path=bad_file)):
        prepare_bad(bad_file, tokenizer)


def test_long_row_is_cut_without_an_end_of_turn_and_listed(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", [converse("Hi", "word " * 40), *make_conversations(2)])
    whole = chat_dataset(str(path), tokenizer=tokenizer, max_seq_len=1000, seed=1)
    cut = chat_dataset(str(path), tokenizer=tokenizer, max_seq_len=90, seed=1)
    assert whole.ledger["truncated"] == 0 and cut.ledger["truncated"] == 1
    row = cut.train[0]
    assert row.tokens.tolist() == whole.train[0].tokens[:90].tolist()
    assert row.supervised[-1] and row.tokens[-1] != tokenizer.end_of_turn_id
    assert row.num_supervised < whole.train[0].num_supervised
    length = len(whole.train[0].tokens)
    [listed] = cut.ledger["rows_truncated"]
    assert (listed["line"], listed["split"]) == (1, "train")
    assert listed["reason"] == f"{length} tokens; the last {length - 90} were cut"
    assert f"max_seq_len={length} keeps every row whole" in cut.ledger["notes"][0]


def test_row_of_exactly_max_seq_len_is_not_cut(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", make_conversations(3))
    longest = chat_dataset(str(path), tokenizer=tokenizer, max_seq_len=1000, seed=1).ledger["training"]["longest_row"]
    assert chat_dataset(str(path), tokenizer=tokenizer, max_seq_len=longest, seed=1).ledger["truncated"] == 0
    assert chat_dataset(str(path), tokenizer=tokenizer, max_seq_len=longest - 1, seed=1).ledger["truncated"] == 1


def test_long_row_can_be_dropped_or_be_an_error(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", [converse("Hi", "word " * 40), *make_conversations(2)])
    options = {"tokenizer": tokenizer, "max_seq_len": 90, "seed": 1}
    dropped = chat_dataset(str(path), on_long_row="drop", **options)
    assert (dropped.ledger["trained"], dropped.ledger["dropped"], dropped.ledger["truncated"]) == (2, 1, 0)
    with pytest.raises(ValueError, match=r"line 1: \d+ tokens, more than max_seq_len=90\nRaise max_seq_len"):
        chat_dataset(str(path), on_long_row="error", **options)


def test_rows_with_supervised_token_in_the_last_place_are_kept(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", make_conversations(1))
    data = chat_dataset(str(path), tokenizer=tokenizer, max_seq_len=1000, seed=1)
    first = int(np.flatnonzero(data.train[0].supervised)[0])
    kept = chat_dataset(str(path), tokenizer=tokenizer, max_seq_len=first + 1, seed=1)
    assert kept.train[0].num_supervised == 1
    with pytest.raises(
        ValueError, match=f"its supervised tokens begin after {first} tokens, beyond max_seq_len={first}"
    ):
        chat_dataset(str(path), tokenizer=tokenizer, max_seq_len=first, seed=1)


def split(path, tokenizer, *, seed=1, fraction=0.2) -> tuple[set[str], set[str]]:
    data = chat_dataset(str(path), tokenizer=tokenizer, max_seq_len=1000, seed=seed, validation_split=fraction)
    return tuple({tokenizer.decode(row.tokens) for row in rows} for rows in (data.train, data.validation))


def test_split_keeps_every_row_on_its_side_when_rows_are_added_or_moved(tmp_path, tokenizer):
    rows = make_conversations(300)
    train, validation = split(write_rows(tmp_path / "a.jsonl", rows[:200]), tokenizer)
    more_train, more_validation = split(write_rows(tmp_path / "b.jsonl", rows[::-1]), tokenizer)
    assert train < more_train and validation < more_validation
    assert len(train) + len(validation) == 200 and not train & validation


def test_split_holds_out_about_its_fraction_and_depends_on_the_seed(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", make_conversations(1000))
    _, validation = split(path, tokenizer)
    # Binomial: 5 standard deviations around 200.
    assert abs(len(validation) - 200) < 5 * np.sqrt(1000 * 0.2 * 0.8)
    assert split(path, tokenizer, seed=2)[1] != validation
    assert split(path, tokenizer, fraction=0.0)[1] == set()


def test_duplicates_are_never_on_both_sides(tmp_path, tokenizer):
    rows = make_conversations(100)
    spaced = [converse(f" {row['messages'][0]['content']}\n", row["messages"][1]["content"]) for row in rows]
    path = write_rows(tmp_path / "a.jsonl", rows + spaced)
    with pytest.raises(ValueError, match=r"line 101: repeats .*a\.jsonl, line 1\n"):
        split(path, tokenizer)
    data = chat_dataset(
        str(path), tokenizer=tokenizer, max_seq_len=1000, seed=1, validation_split=0.2, on_bad_row="drop"
    )
    assert data.ledger["dropped"] == 100
    lines = [line for _, line in list_lines(data.train) + list_lines(data.validation)]
    assert sorted(lines) == list(range(1, 101))


def test_ledger_tells_which_lines_are_for_validation(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", make_conversations(50))
    data = chat_dataset(str(path), tokenizer=tokenizer, max_seq_len=1000, seed=1, validation_split=0.2)
    [file] = data.ledger["files"]
    assert file["validation_lines"] == [line for _, line in list_lines(data.validation)]
    assert data.ledger["validated"] == len(file["validation_lines"])


def test_ledger_counts_tokens_as_the_rows_have_them(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", make_conversations(20))
    for max_seq_len in (60, 1000):
        data = chat_dataset(str(path), tokenizer=tokenizer, max_seq_len=max_seq_len, seed=1)
        assert data.ledger["training"] == {
            "rows": 20,
            "tokens": sum(len(row.tokens) for row in data.train),
            "supervised_tokens": sum(row.num_supervised for row in data.train),
            "longest_row": max(len(row.tokens) for row in data.train),
        }
        assert data.train.lengths().tolist() == [len(row.tokens) for row in data.train]


def test_rows_that_spell_special_tokens_are_noted(tmp_path, tokenizer):
    rows = [*make_conversations(2), converse("What is <|im_end|>?", "A token.")]
    data = chat_dataset(str(write_rows(tmp_path / "a.jsonl", rows)), tokenizer=tokenizer, max_seq_len=1000, seed=1)
    [note] = data.ledger["notes"]
    assert "rows that spell a special token: 1 (lines 3)" in note


def test_keys_that_are_not_used_are_noted(tmp_path, tokenizer):
    rows = [row | {"topic": "boats"} for row in make_conversations(3)]
    rows[0]["messages"][1]["thinking"] = "Hm."
    path = write_rows(tmp_path / "a.jsonl", rows)
    data = chat_dataset(str(path), tokenizer=tokenizer, max_seq_len=1000, seed=1)
    assert data.ledger["notes"] == [
        f"{path}: read as openai; unused keys: topic (3 rows), messages[].thinking (1 rows)"
    ]


def test_limit_of_a_row_holds_in_files_without_lines_too(tmp_path, tokenizer):
    rows = [{"prompt": "Hi", "completion": "x" * size} for size in (10, 10_000_000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: the row is 9\.5 MiB long; the limit is 4 MiB"):
        chat_dataset(f"{tmp_path}/a.parquet", tokenizer=tokenizer, max_seq_len=1000, seed=1)


def test_raw_text_that_was_rendered_with_a_template_is_refused(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "<|im_start|>user\nHi<|im_end|>"}])
    with pytest.raises(ValueError, match=r"line 1: 'text' spells the special token <\|im_start\|>; give the turns"):
        chat_dataset(str(path), tokenizer=tokenizer, max_seq_len=100, seed=1)


def test_raw_text_rows_are_trained_whole(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", [{"text": " The ferry. "}])
    data = chat_dataset(str(path), tokenizer=tokenizer, max_seq_len=100, seed=1)
    assert tokenizer.decode(data.train[0].tokens) == " The ferry. <|endoftext|>"
    assert data.train[0].supervised.all()


def test_files_of_different_shapes_go_together(tmp_path, tokenizer):
    write_rows(tmp_path / "a.jsonl", make_conversations(2))
    write_rows(tmp_path / "b.jsonl", [{"instruction": "Say hi.", "output": "Hi!"}])
    data = chat_dataset(f"{tmp_path}/*.jsonl", tokenizer=tokenizer, max_seq_len=1000, seed=1)
    assert list_lines(data.train) == [("a.jsonl", 1), ("a.jsonl", 2), ("b.jsonl", 1)]


def test_ambiguous_rows_ask_for_a_format_even_where_bad_rows_are_dropped(tmp_path, tokenizer):
    rows = [row | {"text": "rendered"} for row in make_conversations(2)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    options = {"tokenizer": tokenizer, "max_seq_len": 1000, "seed": 1, "on_bad_row": "drop"}
    with pytest.raises(ValueError, match=r"line 1: its keys fit the formats openai and text; say which with"):
        chat_dataset(str(path), **options)
    assert chat_dataset(str(path), format="openai", **options).ledger["trained"] == 2


def test_damaged_files_and_bad_rows_are_in_one_error_even_where_bad_rows_are_dropped(tmp_path, tokenizer):
    (tmp_path / "a.json").write_text('[{"text": "x"}, {"text"')
    (tmp_path / "b.json").write_text("[1")
    with pytest.raises(ValueError, match=r"a\.json, row 2: malformed JSON.*\n.*b\.json, row 1: malformed JSON"):
        chat_dataset(
            [f"{tmp_path}/a.json", f"{tmp_path}/b.json"],
            tokenizer=tokenizer,
            max_seq_len=100,
            seed=1,
            on_bad_row="drop",
        )


def test_long_list_of_problems_is_shortened_and_counted(tmp_path, tokenizer):
    rows = [{f"column{number}": "x"} for number in range(30)]
    rows[29:] = [{"Frage": "x", "Antwort": "y", "Seite": "z"}] * 471
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError) as error:
        chat_dataset(f"{tmp_path}/a.jsonl", tokenizer=tokenizer, max_seq_len=100, seed=1)
    lines = str(error.value).splitlines()
    assert len(lines) == 22
    assert lines[20] == "and 480 more rows"


def test_rows_with_the_same_fault_are_one_line_with_a_way_out(tmp_path, tokenizer):
    (tmp_path / "a.csv").write_text("Frage,Antwort,Seite\n" + "x,y,z\n" * 471)
    with pytest.raises(ValueError) as error:
        chat_dataset(f"{tmp_path}/a.csv", tokenizer=tokenizer, max_seq_len=100, seed=1)
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert "'dataset.columns={prompt: Frage, completion: Antwort}'; the same in 470 more, up to line 472" in lines[0]


def test_data_without_a_row_to_train_on_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"there is no row to train on in .*a\.jsonl$"):
        chat_dataset(f"{tmp_path}/a.jsonl", tokenizer=tokenizer, max_seq_len=100, seed=1)
    (tmp_path / "b.jsonl").write_text("{}\n")
    with pytest.raises(
        ValueError, match=r"to train on in .*b\.jsonl; 1 rows were dropped, the first is .*line 1: its keys"
    ):
        chat_dataset(f"{tmp_path}/b.jsonl", tokenizer=tokenizer, max_seq_len=100, seed=1, on_bad_row="drop")


def test_split_that_holds_out_nothing_names_one_that_does(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", make_conversations(5))
    options = {"tokenizer": tokenizer, "max_seq_len": 1000, "seed": 1}
    with pytest.raises(ValueError, match="holds out none of the 5 rows") as error:
        chat_dataset(str(path), validation_split=0.001, **options)
    fraction = float(str(error.value).split("at least ")[1].split(",")[0])
    assert len(chat_dataset(str(path), validation_split=fraction, **options).validation) == 1
    assert fraction < 1


def test_fingerprint_changes_with_rows_order_split_and_limit(tmp_path, tokenizer):
    rows = make_conversations(30)

    def compute(given, **options):
        path = write_rows(tmp_path / "a.jsonl", given)
        options = {"max_seq_len": 1000, "seed": 1} | options
        return chat_dataset(str(path), tokenizer=tokenizer, **options).ledger["fingerprint"]

    assert compute(rows) == compute(rows)
    others = [
        compute(rows[:-1]),
        compute(rows[::-1]),
        compute(rows, validation_split=0.2),
        compute(rows, max_seq_len=9999),
    ]
    assert len({compute(rows), *others}) == 5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"format": "chat"}, "dataset.format=chat is not one of auto, openai, sharegpt"),
        ({"on_bad_row": "ignore"}, "dataset.on_bad_row=ignore is not one of error, drop"),
        ({"on_long_row": None}, "dataset.on_long_row=None is not one of truncate, split, drop, error"),
        ({"validation_split": 1.0}, "dataset.validation_split=1.0 must be a fraction"),
        ({"validation_split": "0.1"}, "dataset.validation_split=0.1 must be a fraction"),
        ({"validation_split": 0.1, "validation_files": ["{file}"]}, "are both given; set one of them to null"),
        ({"files": []}, r"dataset.files=\[\] names no file"),
        ({"files": None}, "dataset.files=None names no file"),
        ({"files": ["missing.jsonl"]}, "missing.jsonl: no such file"),
        ({"validation_files": ["missing.jsonl"]}, "missing.jsonl: no such file"),
    ],
)
def test_options_and_files_are_checked_without_a_tokenizer(tmp_path, options, said):
    path = write_rows(tmp_path / "a.jsonl", make_conversations(2))
    options = {
        key: [str(path) if value == "{file}" else value for value in values] if isinstance(values, list) else values
        for key, values in ({"files": [str(path)]} | options).items()
    }
    problems = check_files(options)
    assert len(problems) == 1
    assert re.search(said, problems[0])


def test_good_options_have_no_problem_as_a_config_node_either(tmp_path):
    from omegaconf import OmegaConf

    path = write_rows(tmp_path / "a.jsonl", make_conversations(2))
    node = OmegaConf.create(
        {"_component_": "x", "files": [str(path)], "validation_split": 0.1, "validation_files": None}
    )
    assert check_files(node) == []


@pytest.mark.parametrize(
    ("prompts", "found", "note"),
    [
        (["Be\u2028brief."] * 3, "Be\u2028brief.", None),
        (["Be brief.", "Be brief.\n", " Be brief."], "Be brief.", None),  # all are trained like the first
        ([None] * 3, None, None),
        (["Be brief.", "Be long."], None, "have 2 system prompts; the Modelfile gets"),
        (["Be brief.", None], None, "have 1 system prompt, and 1 rows have none; the Modelfile gets"),
        ([*map(str, range(300))], None, "have at least 101 system prompts; the Modelfile gets"),
    ],
    ids=["the same", "the same but for spaces", "none", "two", "one row without", "many"],
)
def test_ledger_has_the_system_prompt_that_every_training_row_has(tmp_path, tokenizer, prompts, found, note):
    rows = add_system_prompts(make_conversations(len(prompts)), prompts)
    validation = write_rows(tmp_path / "heldout.jsonl", make_conversations(2, start=500))
    path = write_rows(tmp_path / "a.jsonl", rows)
    texts = write_rows(tmp_path / "b.jsonl", [{"text": "A raw text is no conversation."}])
    data = chat_dataset(
        [str(path), str(texts)],
        tokenizer=tokenizer,
        max_seq_len=200,
        seed=1,
        validation_files=str(validation),
        on_bad_row="drop",
    )
    assert data.ledger["system_prompt"] == found
    said = [one for one in data.ledger["notes"] if "system prompt" in one]
    assert len(said) == (note is not None) and all(note in one for one in said)


def add_system_prompts(rows: list[dict], prompts: list[str | None]) -> list[dict]:
    for row, prompt in zip(rows, prompts, strict=True):
        row["messages"][:0] = [] if prompt is None else [{"role": "system", "content": prompt}]
    return rows


@pytest.mark.parametrize("out", ["validation", "long", "bad", "repeated"])
def test_system_prompts_of_rows_that_are_not_trained_do_not_count(tmp_path, tokenizer, out):
    """The last row of the file has another system prompt, or none, and is not trained on."""
    rows = add_system_prompts(make_conversations(12), ["Be brief."] * 12)
    [other] = add_system_prompts(make_conversations(1, start=50), ["Be long." if out != "bad" else None])
    options = {"on_bad_row": "drop"}
    if out == "long":
        other["messages"][1]["content"] *= 50
        options["on_long_row"] = "drop"
    elif out == "bad":
        other["messages"].pop()
    elif out == "repeated":
        other = rows[0]
    elif out == "validation":
        options["validation_split"] = 0.3
        # Of many rows with the other prompt, take one that is held out.
        others = add_system_prompts(make_conversations(50, start=50), ["Be long."] * 50)
        path = write_rows(tmp_path / "b.jsonl", others)
        data = chat_dataset(str(path), tokenizer=tokenizer, max_seq_len=200, seed=1, validation_split=0.3)
        other = others[data.validation[0].source.line - 1]
    path = write_rows(tmp_path / "a.jsonl", [*rows, other])
    data = chat_dataset(str(path), tokenizer=tokenizer, max_seq_len=200, seed=1, **options)
    assert data.ledger["dropped"] + data.ledger["validated"] > 0
    assert data.ledger["system_prompt"] == "Be brief."
    assert not any("system prompt" in note for note in data.ledger["notes"])


ENDS = {
    "openai": {"messages": [{"role": "user", "content": "Hi?{}"}, {"role": "assistant", "content": "Ahoy!{}"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi?{}"}, {"from": "gpt", "value": "Ahoy!{}"}]},
    "alpaca": {"instruction": "Hi?{}", "output": "Ahoy!{}", "system": "Be brief.{end}"},
    "prompt_completion": {"prompt": "Hi?{}", "completion": "Ahoy!{}"},
    "text": {"text": "Ahoy!{}"},
}


@pytest.mark.parametrize("format", ENDS)
@pytest.mark.parametrize("end", ["<|im_end|>", " <|im_end|> \n", "<|eot_id|>", "<|endoftext|>\n"])
def test_end_of_turn_that_a_row_brings_along_is_taken_off_once_and_counted(tmp_path, tokenizer, format, end):
    def prepare(name, ends):
        row = json.dumps(ENDS[format])
        ends = [one.replace(" <", "<") if format == "text" else one for one in ends]  # its white space is kept
        spelled = [json.dumps(one)[1:-1] for one in ends]
        rows = [json.loads(row.replace("{}", one).replace("{end}", one[2:])) for one in spelled]
        path, heldout = write_rows(tmp_path / name, rows[:-1]), write_rows(tmp_path / f"v-{name}", rows[-1:])
        options = {"tokenizer": tokenizer, "max_seq_len": 200, "seed": 1, "validation_files": str(heldout)}
        return chat_dataset(str(path), **options)

    clean, ended = (
        prepare("a.jsonl", ["1!", "2!", "3!"]),
        prepare("b.jsonl", [f"{n}!{e}" for n, e in ((1, end), (2, ""), (3, end))]),
    )
    for side in ("train", "validation"):
        before, after = (list(getattr(data, side)) for data in (clean, ended))
        assert [tokenizer.decode(row.tokens).rstrip() for row in after] == [
            tokenizer.decode(row.tokens).rstrip() for row in before
        ]
    notes = [note for note in ended.ledger["notes"] if "white space" not in note]
    assert [note.partition(": ")[2].partition(";")[0] for note in notes] == [
        "rows with an end-of-turn token at the end of a turn: 1"
    ] * 2
    assert clean.ledger["notes"] == []
    lines = format_validation_rows(ended.validation).splitlines()
    assert "<|" not in "".join(lines) and len(lines) == 1


@pytest.mark.parametrize("said", ["<|im_end|> ends a turn.", "Ahoy!<|im_end|><|im_end|>"])
def test_end_of_turn_that_stands_elsewhere_stays_text_and_is_told(tmp_path, tokenizer, said):
    row = {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": said}]}
    data = chat_dataset(str(write_rows(tmp_path / "a.jsonl", [row])), tokenizer=tokenizer, max_seq_len=200, seed=1)
    assert said.removesuffix("<|im_end|>") in tokenizer.decode(data.train[0].tokens)
    assert any("rows that spell a special token: 1" in note for note in data.ledger["notes"])


def test_reply_that_is_an_end_of_turn_alone_is_empty(tmp_path, tokenizer):
    row = {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": " <|im_end|>"}]}
    with pytest.raises(ValueError, match=r"line 1: message 2 \(assistant\) is empty"):
        chat_dataset(str(write_rows(tmp_path / "a.jsonl", [row])), tokenizer=tokenizer, max_seq_len=200, seed=1)


def test_white_space_around_contents_is_taken_off_counted_and_gone_from_the_validation_rows(tmp_path, tokenizer):
    def prepare(name, *questions):
        rows = [{"prompt": question, "completion": f"{number}!"} for number, question in enumerate(questions)]
        path, heldout = write_rows(tmp_path / name, rows[:-1]), write_rows(tmp_path / f"v-{name}", rows[-1:])
        options = {"tokenizer": tokenizer, "max_seq_len": 200, "seed": 1, "validation_files": str(heldout)}
        return chat_dataset(str(path), **options)

    clean, spaced = prepare("a.jsonl", "Hi?", "Ho?", "He?"), prepare("b.jsonl", " Hi?\n", "Ho?", "\u3000He?")
    for side in ("train", "validation"):
        before, after = (list(getattr(data, side)) for data in (clean, spaced))
        assert [row.tokens.tolist() for row in after] == [row.tokens.tolist() for row in before]
    assert clean.ledger["notes"] == []
    assert [note.partition(": ")[2].partition(";")[0] for note in spaced.ledger["notes"]] == [
        "rows with white space around a message: 1"
    ] * 2
    assert "\u3000" not in format_validation_rows(spaced.validation)
