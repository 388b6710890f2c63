"""Files in the formats that public tools document: read directly, or with the override that the error suggests."""

import gzip
import json
import re
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from tests.conftest import REPOSITORY
from tune2gguf.config.read import apply_overrides
from tune2gguf.data import PreparedData, chat_dataset
from tune2gguf.tokenizer.tokenizer import ChatTokenizer, load_tokenizer

SHAPES = REPOSITORY / "tests/data/shapes"
REPLY = re.compile(r"<\|im_start\|>assistant\n(.*?)<\|im_end\|>", re.DOTALL)
PROMPT = re.compile(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", re.DOTALL)


@pytest.fixture(scope="module")
def tokenizer(tiny_base) -> ChatTokenizer:
    return load_tokenizer(tiny_base, chat_template="chatml")


def prepare(path: Path, tokenizer: ChatTokenizer, overrides: str = "", **options) -> PreparedData:
    """Prepare a file with overrides as typed after a run's command."""
    config = OmegaConf.create({"dataset": {}})
    apply_overrides(config, shlex.split(overrides))
    given = OmegaConf.to_container(config.dataset) | options
    return chat_dataset(str(path), tokenizer=tokenizer, max_seq_len=1000, seed=1, **given)


def get_trained(data: PreparedData, tokenizer: ChatTokenizer) -> list[str]:
    """Return the trained text of each row, without end tokens."""
    return [
        tokenizer.decode(row.tokens[row.supervised].tolist()).removesuffix("<|im_end|>").removesuffix("<|endoftext|>")
        for row in data.train
    ]


DOLLY = "'dataset.prompt=\"{instruction}\\n\\n{context}\"' 'dataset.columns={completion: response}'"

# File, overrides, format, prompts of the first row and the trained texts of the rows.
READ = [
    (
        "openai_chat.jsonl",
        "",
        "openai",
        ["When does the tide turn?"],
        [
            "At a quarter past four.",
            "Until six, then the mail boat comes.<|im_end|>At the north wall.",
            "Whoever sees the fog first.",
        ],
    ),
    ("openai_weight.jsonl", "", "openai", ["Say hello.", "Say hello, please."], ["Hello, sailor.", "The bowline."]),
    ("openai_parts.jsonl", "", "openai", ["Here is the log.\nWho was on watch?"], ["Marlo was.", "Fair wind."]),
    ("value_parts.jsonl", "", "openai", ["Here is the log.\nWho was on watch?"], ["Marlo was."]),
    ("sharegpt.json", "", "sharegpt", ["How deep is the channel?"], ["Nine feet at low water.", "Mostly."]),
    ("axolotl_train.jsonl", "", "openai", ["Count the lamps.", "Count again."], ["Three.", "Keep right."]),
    ("axolotl_weight.jsonl", "", "sharegpt", ["Count the lamps.", "Count again."], ["Three."]),
    ("alpaca_text.json", "", "alpaca", ["Translate into signal flags.\n\nI need a pilot."], ["G", "The jib."]),
    (
        "dolly.jsonl",
        DOLLY,
        "prompt_completion",
        ["When was the pier built?\n\nThe pier was built in 1887 and burnt in 1904."],
        ["In 1887.", "Mistral, bora, sirocco.", "A fitting that a rope is made fast to."],
    ),
    (
        "gsm8k.jsonl",
        "'dataset.columns={prompt: question, completion: answer}'",
        "prompt_completion",
        ["A ferry carries 12 cars a trip and makes 5 trips. How many cars is that?"],
        ["It carries 12 * 5 = <<12*5=60>>60 cars.\n#### 60", "20 - 3 = <<20-3=17>>17 feet.\n#### 17"],
    ),
    (
        "speakers.jsonl",
        "'dataset.columns={messages: dialog, role: speaker, content: text}'",
        "openai",
        ["Is the bar open?"],
        ["From noon on.", "All day."],
    ),
    (
        "completion.jsonl",
        "",
        "prompt_completion",
        ["Write a line about fog."],
        ["The fog forgot the harbour.", "Rain counted the planks."],
    ),
    (
        "trl_conversational.jsonl",
        "",
        "prompt_completion",
        ["Hi.", "What colour is port?"],
        ["Red.", "Green."],
    ),
    (
        "preference.jsonl",
        "'dataset.columns={completion: chosen}'",
        "prompt_completion",
        ["What colour is port?"],
        ["Red.", "Green."],
    ),
    (
        "preference_conversational.jsonl",
        "'dataset.columns={completion: chosen}'",
        "prompt_completion",
        ["What colour is port?"],
        ["Red."],
    ),
    (
        "preference_implicit.jsonl",
        "'dataset.columns={messages: chosen}'",
        "openai",
        ["What colour is port?"],
        ["Red."],
    ),
    (
        "text.jsonl",
        "",
        "text",
        [],
        ["The harbour has two lights, one red and one green.", "At low water the old pier shows."],
    ),
    (
        "articles.jsonl",
        "'dataset.columns={text: body}'",
        "text",
        [],
        ["The harbour has two lights, one red and one green.", "At low water the old pier shows."],
    ),
    (
        "tickets.csv",
        "'dataset.columns={prompt: Customer message, completion: Agent reply}'",
        "prompt_completion",
        ["My ticket is wet, is it valid?"],
        ["Yes, show the number.", "One dog a person."],
    ),
    ("chat_in_csv.csv", "'dataset.columns={messages: chat}'", "openai", ["Ahoy?"], ["Ahoy!"]),
]


@pytest.mark.parametrize(("name", "overrides", "format", "prompts", "trained"), READ, ids=[row[0] for row in READ])
def test_file_is_read_and_trained_as_its_tool_means_it(tokenizer, name, overrides, format, prompts, trained):
    data = prepare(SHAPES / name, tokenizer, overrides)
    [file] = data.ledger["files"]
    assert file["format"] == format
    assert PROMPT.findall(tokenizer.decode(data.train[0].tokens.tolist())) == prompts
    assert get_trained(data, tokenizer) == trained


@pytest.mark.parametrize(
    ("name", "overrides"),
    [(name, overrides) for name, overrides, *_ in READ if overrides and name != "chat_in_csv.csv"],
)
def test_refusal_names_the_override_that_reads_the_file(tokenizer, name, overrides):
    with pytest.raises(ValueError) as error:
        prepare(SHAPES / name, tokenizer)
    first = str(error.value).splitlines()[0]
    assert re.match(rf".*{re.escape(name)}, (line|row) \d+: ", first)
    assert first.partition("; the same in")[0].endswith(f": {overrides}")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("image_parts.jsonl", r"line 1: messages\[0\]\.content\[1\] is of type 'image_url'; only parts of type 'text'"),
        ("train_detail.jsonl", r"line 1: messages\[1\]: 'train_detail' marks parts of a turn; a turn is trained whole"),
        ("oasst_tree.jsonl", r"line 1: the row is one message of a conversation tree \(parent_id, role, text\)"),
        ("kto.jsonl", r"line 2: 'label' is false, which marks a reply that must not be trained"),
        ("preference.jsonl", r"line 1: the row is preference data \(chosen, rejected\)"),
    ],
)
def test_file_that_cannot_be_trained_on_as_it_stands_is_a_line_a_row(tokenizer, name, said):
    with pytest.raises(ValueError) as error:
        prepare(SHAPES / name, tokenizer)
    lines = str(error.value).splitlines()
    assert re.search(said, lines[0])
    num_bad = len([line for line in lines if re.match(rf".*{name}, line \d+: ", line)])
    assert len(lines) == num_bad + 1 and "dataset.on_bad_row=drop" in lines[-1]


def test_rows_labelled_as_bad_replies_are_dropped_by_name(tokenizer):
    data = prepare(SHAPES / "kto.jsonl", tokenizer, on_bad_row="drop")
    assert get_trained(data, tokenizer) == ["Red."]
    assert data.ledger["dropped"] == 1


@pytest.mark.parametrize(
    "name", ["openai_chat.jsonl", "axolotl_train.jsonl", "gsm8k.jsonl", "text.jsonl", "dolly.jsonl"]
)
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl.gz", ".json"])
def test_same_rows_in_another_file_format_train_the_same(tmp_path, tokenizer, name, suffix):
    overrides, trained = next((row[1], row[4]) for row in READ if row[0] == name)
    content = (SHAPES / name).read_text()
    rows = [json.loads(line) for line in content.splitlines()]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress(content.encode()) if suffix == ".jsonl.gz" else json.dumps(rows).encode())
    assert get_trained(prepare(path, tokenizer, overrides), tokenizer) == trained


def test_every_file_of_the_folder_is_tried():
    tried = {row[0] for row in READ} | {"image_parts.jsonl", "train_detail.jsonl", "oasst_tree.jsonl", "kto.jsonl"}
    assert tried == {path.name for path in SHAPES.iterdir()} and len(tried) >= 15


def test_text_column_beside_alpaca_is_left_out_and_named(tokenizer):
    path = SHAPES / "alpaca_text.json"
    assert prepare(path, tokenizer).ledger["notes"] == [f"{path}: read as alpaca; unused keys: text (2 rows)"]


def test_weight_of_a_turn_that_is_never_trained_is_named(tmp_path, tokenizer):
    turns = [{"role": "user", "content": "Hi", "weight": 1}, {"role": "assistant", "content": "Ho", "weight": 1}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns}))
    [note] = prepare(tmp_path / "a.jsonl", tokenizer).ledger["notes"]
    assert note.endswith("unused keys: messages[].weight of the user (1 rows)")
