"""heldout.jsonl: the conversations of the validation rows, from any kind of file."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import make_conversations, write_rows
from tune2gguf.data import PreparedData, chat_dataset
from tune2gguf.runs.validation_rows import format_validation_rows
from tune2gguf.tokenizer.tokenizer import load_tokenizer


def prepare(path, tiny_base, **options) -> PreparedData:
    tokenizer = load_tokenizer(tiny_base, chat_template="chatml")
    return chat_dataset(str(path), tokenizer=tokenizer, max_seq_len=1000, seed=1, validation_split=0.3, **options)


def write_prompts(path) -> None:
    rows = [{"prompt": f"Question {number}?", "completion": f"Answer\n{number}."} for number in range(30)]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        write_rows(path, rows)


@pytest.mark.parametrize("format", ["auto", "prompt_completion"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_lines_are_the_validation_rows_in_their_order(tmp_path, tiny_base, name, format):
    write_prompts(tmp_path / name)
    data = prepare(tmp_path / name, tiny_base, format=format)
    records = [json.loads(line) for line in format_validation_rows(data.validation).splitlines()]
    assert 0 < len(records) < 30
    tokenizer = load_tokenizer(tiny_base, chat_template="chatml")
    for record, row in zip(records, data.validation, strict=True):
        assert record["source"] == str(row.source)
        question, answer = (message["content"] for message in record["messages"])
        assert f"user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>" in tokenizer.decode(row.tokens)


def test_file_that_has_changed_since_is_refused(tmp_path, tiny_base):
    rows = make_conversations(30)
    path = write_rows(tmp_path / "a.jsonl", rows)
    validation = prepare(path, tiny_base).validation
    for changed in (rows[::-1], rows[:1], [{"messages": []}] * 30, [{"text": "x"}] * 30):
        write_rows(path, changed)
        with pytest.raises(ValueError, match=r"a\.jsonl, line \d+: changed while the run was starting"):
            format_validation_rows(validation)
    path.write_bytes(b"{\n" * 30)
    with pytest.raises(ValueError, match=r"a\.jsonl, line \d+"):
        format_validation_rows(validation)
