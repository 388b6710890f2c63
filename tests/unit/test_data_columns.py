"""Column mapping: columns of any name, prompt templates over several columns, and errors for wrong mappings."""

import json
import re

import pytest

from tests.conftest import write_rows
from tune2gguf.data import PreparedData, chat_dataset, check_files
from tune2gguf.data.columns import RowReader, make_reader, read_template
from tune2gguf.tokenizer.conversation import Conversation, Message
from tune2gguf.tokenizer.tokenizer import load_tokenizer


def prepare(path, tiny_base, **options) -> PreparedData:
    tokenizer = load_tokenizer(tiny_base, chat_template="chatml")
    return chat_dataset(str(path), tokenizer=tokenizer, max_seq_len=1000, seed=1, **options)


def read(row: dict, **options) -> Conversation:
    reader = make_reader(options)
    return reader.read(row, format=reader.detect(row))


def talk(question: str, answer: str) -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)))


@pytest.mark.parametrize(
    ("columns", "row", "expected"),
    [
        ({"prompt": "q", "completion": "a"}, {"q": "Hi", "a": "Ho"}, talk("Hi", "Ho")),
        ({"completion": "a"}, {"prompt": "Hi", "a": "Ho"}, talk("Hi", "Ho")),
        ({"instruction": "task", "output": "a"}, {"task": "Hi", "input": "x", "a": "Ho"}, talk("Hi\n\nx", "Ho")),
        ({"instruction": "q", "input": "c", "output": "a"}, {"q": "Hi", "c": "x", "a": "Ho"}, talk("Hi\n\nx", "Ho")),
        (
            {"messages": "chat"},
            {"chat": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
            talk("Hi", "Ho"),
        ),
        (
            {"messages": "chat"},
            {"chat": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
            talk("Hi", "Ho"),
        ),
        (
            {"conversations": "chat", "from": "who", "value": "what"},
            {"chat": [{"who": "human", "what": "Hi"}, {"who": "gpt", "what": "Ho"}]},
            talk("Hi", "Ho"),
        ),
        (
            {"role": "who", "content": "what"},
            {"messages": [{"who": "user", "what": "Hi"}, {"who": "assistant", "what": "Ho"}]},
            talk("Hi", "Ho"),
        ),
        ({"text": "body"}, {"body": "Fog."}, Conversation(text="Fog.")),
        (
            {"system": "persona", "prompt": "q", "completion": "a"},
            {"persona": "Be brief.", "q": "Hi", "a": "Ho"},
            Conversation((Message("system", "Be brief."), *talk("Hi", "Ho").messages)),
        ),
    ],
)
def test_every_format_takes_columns_of_other_names(columns, row, expected):
    assert read(row, columns=columns) == expected


def test_columns_settle_what_the_keys_alone_leave_open():
    row = {"question": "Hi", "answer": "Ho", "text": "<rendered>", "messages": []}
    assert read(row, columns={"prompt": "question", "completion": "answer"}) == talk("Hi", "Ho")


def test_key_that_a_column_takes_the_place_of_is_unused_and_named():
    row = {"prompt": "old", "question": "Hi", "completion": "Ho"}
    conversation = read(row, columns={"prompt": "question"})
    assert conversation == talk("Hi", "Ho")
    assert conversation.unused_keys == ("prompt",)


TEMPLATE = "Task: {task}\n\nContext: {context}"


@pytest.mark.parametrize(
    ("row", "prompt", "absent"),
    [
        ({"task": "Sum up.", "context": "Fog."}, "Task: Sum up.\n\nContext: Fog.", ()),
        ({"task": "Sum up.", "context": ""}, "Task: Sum up.", ("context",)),
        ({"task": "Sum up.", "context": " \n"}, "Task: Sum up.", ("context",)),
        ({"task": "Sum up.", "context": None}, "Task: Sum up.", ("context",)),
        ({"task": "Sum up."}, "Task: Sum up.", ("context",)),
        ({"task": "", "context": "Fog."}, "Context: Fog.", ("task",)),
    ],
)
def test_prompt_is_joined_and_an_empty_column_takes_the_text_before_it_along(row, prompt, absent):
    conversation = read(row | {"completion": "Ho"}, prompt=TEMPLATE)
    assert conversation.messages[0].content.strip() == prompt
    assert conversation.absent_columns == absent


def test_row_of_which_every_part_of_the_prompt_is_empty_is_refused():
    with pytest.raises(ValueError, match=r"message 1 \(user\) is empty"):
        read({"task": "", "completion": "Ho"}, prompt="Task: {task}. Begin.")


@pytest.mark.parametrize(
    ("template", "filled"),
    [
        ("{q}", "Hi"),
        ("{q}{q}", "HiHi"),
        (r"{q}\n\t{q}", "Hi\n\tHi"),
        ("{{q}} {q}", "{q} Hi"),
        ("{q} Answer.", "Hi Answer."),
    ],
)
def test_template_is_filled_as_written(template, filled):
    assert read({"q": "Hi", "completion": "Ho"}, prompt=template).messages[0].content == filled


@pytest.mark.parametrize("name", ["my col.", "q: 1", "a!r", "a!r:b", "frage, kurz", "ключ"])
def test_column_of_any_name_is_a_column(name):
    assert read({name: "Hi", "completion": "Ho"}, prompt=f"{{{name}}}") == talk("Hi", "Ho")
    assert read({name: "Hi", "completion": "Ho"}, columns={"prompt": name}) == talk("Hi", "Ho")


@pytest.mark.parametrize("template", ["no column", "{", "{q", "q}", "{}", "{q} { }"])
def test_template_without_a_column_is_refused(template):
    with pytest.raises(ValueError, match="brace"):
        read_template(template)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"columns": {"promt": "q"}}, r"unknown part 'promt'; did you mean 'prompt'\?"),
        ({"columns": {"question": "prompt"}}, "write part: column, that is prompt: question"),
        ({"columns": {"prompt": "a", "completion": "a"}}, "column 'a' is mapped to two parts"),
        ({"columns": {"prompt": 3}}, "the column of 'prompt' must be a name, got 3"),
        ({"columns": {}}, "must map parts to columns"),
        ({"columns": "q"}, "must map parts to columns"),
        ({"columns": {"prompt": "q", "output": "a"}}, "no format has 'prompt' and 'output'"),
        ({"columns": {"prompt": "q"}, "format": "openai"}, "'prompt' is not a part of format=openai"),
        ({"columns": {"prompt": "q"}, "prompt": "{q}"}, "keep one of the two"),
        ({"prompt": "{q}", "format": "text"}, "'prompt' is not a part of format=text"),
        ({"prompt": "no column"}, ": no column; write one in braces"),
        ({"prompt": 3}, "must be text"),
    ],
)
def test_wrong_mapping_is_one_line_before_a_row_is_read(tmp_path, options, said):
    [problem] = check_files({"files": [str(write_rows(tmp_path / "a.jsonl", [{"q": "x"}]))], **options})
    assert re.search(said, problem) and "\n" not in problem


def test_column_that_no_row_has_is_refused_by_name(tmp_path, tiny_base):
    rows = [{"question": f"Hi {number}", "completion": "Ho"} for number in range(3)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(
        ValueError, match=r"a\.jsonl: column 'contxt' of dataset\.columns or dataset\.prompt is empty or missing"
    ):
        prepare(path, tiny_base, prompt="{question} {contxt}")


def test_column_that_some_rows_lack_is_noted(tmp_path, tiny_base):
    rows = [{"question": f"Hi {number}", "completion": "Ho", "context": "x" * (number > 0)} for number in range(3)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    data = prepare(path, tiny_base, prompt="{question} {context}")
    assert data.ledger["notes"] == [f"{path}: columns left out because empty or missing: context (1 rows)"]


def test_missing_column_is_a_bad_row_that_names_it(tmp_path, tiny_base):
    path = write_rows(tmp_path / "a.jsonl", [{"question": "Hi", "answer": "Ho"}, {"question": "Hi"}])
    columns = {"prompt": "question", "completion": "answer"}
    with pytest.raises(ValueError) as error:
        prepare(path, tiny_base, columns=columns, format="prompt_completion")
    assert str(error.value).splitlines()[0] == (
        f"{path}, line 2: 'completion' is missing; the row has prompt; 'completion' is the column 'answer'"
    )


def test_reader_says_how_it_reads():
    reader = RowReader(columns=(("completion", "answer"),), prompt="{q}\n{c}")
    assert reader.describe() == "completion = column 'answer', prompt = '{q}\\n{c}'"
    assert RowReader().describe() == ""


def test_same_rows_by_other_names_are_the_same_rows(tmp_path, tiny_base):
    """The split and the fingerprint depend on the trained content, not on column names."""
    pairs = [(f"Question {number}?", f"Answer {number}.") for number in range(60)]
    first = write_rows(tmp_path / "a.jsonl", [{"prompt": q, "completion": a} for q, a in pairs])
    second = write_rows(tmp_path / "b.jsonl", [{"Q": q, "A": a} for q, a in pairs])
    one = prepare(first, tiny_base, validation_split=0.3)
    other = prepare(second, tiny_base, validation_split=0.3, columns={"prompt": "Q", "completion": "A"})
    assert one.ledger["fingerprint"] == other.ledger["fingerprint"]
    assert json.dumps(one.ledger["training"]) == json.dumps(other.ledger["training"])
