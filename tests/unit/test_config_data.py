"""Config keys for data: columns, prompt and sources are read, printed and checked."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.conftest import make_conversations, write_rows
from tune2gguf.commands import format_overrides
from tune2gguf.config import check_config, load_config, read_config
from tune2gguf.data.columns import read_template

OWN_COLUMNS = {
    "dataset.columns": {"prompt": "question", "completion": "my: answer"},
    "dataset.prompt": None,
}
OWN_PROMPT = {"dataset.prompt": "{task}:\n\n{a b} {{x}} ${y}", "dataset.columns": {"completion": "2024"}}
OWN_SOURCES = {
    "dataset.files": None,
    "dataset.sources": [
        {"files": ["a b.jsonl", "c,d.jsonl"], "columns": {"text": "body"}, "weight": 0.5},
        {"files": "e.jsonl", "prompt": "{q}\n", "rows": 10, "validation_split": None},
    ],
}


@pytest.mark.parametrize("values", [OWN_COLUMNS, OWN_PROMPT, OWN_SOURCES])
def test_columns_prompt_and_sources_are_read_as_they_are_printed(values, run_arguments):
    config = OmegaConf.to_container(read_config(Path(run_arguments[1]), format_overrides(values)), resolve=True)
    assert {key: config["dataset"][key.partition(".")[2]] for key in values} == values


@pytest.mark.parametrize(
    "typed",
    [
        "dataset.prompt={question}",
        'dataset.prompt="{question}"',
        "dataset.prompt='{question}'",
    ],
)
def test_prompt_is_text_however_it_is_quoted(typed, run_arguments):
    assert read_config(Path(run_arguments[1]), [typed]).dataset.prompt == "{question}"


def test_line_break_of_a_prompt_may_be_spelled_or_quoted(run_arguments):
    spelled = read_config(Path(run_arguments[1]), [r"dataset.prompt={a}\n\n{b}"]).dataset.prompt
    quoted = read_config(Path(run_arguments[1]), [r'dataset.prompt="{a}\n\n{b}"']).dataset.prompt
    assert read_template(spelled) == read_template(quoted) == (("", "a"), ("\n\n", "b"))


@pytest.mark.parametrize(
    "typed",
    [["dataset.columns={prompt: q, completion: a}"], ["dataset.columns.prompt=q", "dataset.columns.completion=a"]],
)
def test_columns_of_an_override_take_the_place_of_the_configs(typed, tmp_path, run_arguments):
    config = OmegaConf.load(run_arguments[1])
    config.dataset.columns = {"instruction": "x", "output": "y"}
    OmegaConf.save(config, tmp_path / "own.yaml")
    found = OmegaConf.to_container(read_config(tmp_path / "own.yaml", typed).dataset)["columns"]
    assert found == {"prompt": "q", "completion": "a"} | ({"instruction": "x", "output": "y"} if len(typed) > 1 else {})


def test_mapping_of_columns_is_accepted_and_its_mistakes_are_named(run_arguments, tmp_path):
    rows = [{"question": f"Hi {number}?", "answer": "Ho."} for number in range(20)]
    own = [
        *run_arguments,
        f"dataset.files=[{write_rows(tmp_path / 'own.jsonl', rows)}]",
        "dataset.validation_files=null",
    ]
    columns = "dataset.columns={prompt: question, completion: answer}"
    check_config(load_config([*own, "dataset.validation_split=0.3", columns]))
    with pytest.raises(ValueError, match=r"unknown part 'promt'; did you mean 'prompt'\?"):
        check_config(load_config([*own, "dataset.columns={promt: question}"]))
    with pytest.raises(ValueError, match=r"unknown config key 'dataset.on_bad_row.x'"):
        check_config(load_config([*own, "dataset.on_bad_row.x=1"]))


def test_validation_of_a_source_counts_as_validation(run_arguments, tmp_path):
    path = write_rows(tmp_path / "own.jsonl", make_conversations(40))
    own = ["dataset.files=null", "dataset.validation_files=null", "early_stopping_patience=2"]
    with pytest.raises(ValueError, match="early_stopping_patience=2 needs validation rows"):
        check_config(load_config([*run_arguments, *own, f"dataset.sources=[{{files: {path}}}]"]))
    check_config(load_config([*run_arguments, *own, f"dataset.sources=[{{files: {path}, validation_split: 0.3}}]"]))
