"""The merged Hugging Face folder in transformers renders and ends a turn as trained."""

import json
from pathlib import Path

import pytest

from tests.parity.gguf_models import write_biased_base, write_run
from tune2gguf.export.pipeline import export_run
from tune2gguf.tokenizer.templates import CHATML
from tune2gguf.tokenizer.tokenizer import load_tokenizer

MAX_NEW_TOKENS = 40
END_OF_TEXT = 381  # <|endoftext|>, the end token of a base that is no instruct model


def write_merged(folder: Path, *, config: dict, generation: dict | None) -> Path:
    """Export a base that ends its turn at once, with these config files."""
    base_dir = write_biased_base(folder / "base", lambda token: 9.0 if token == "<|im_end|>" else 0.0)
    path = base_dir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if generation is not None:
        (base_dir / "generation_config.json").write_text(json.dumps(generation))
    run_dir = write_run(base_dir, folder / "run", chat_template="chatml")
    return export_run(run_dir, with_merged_hf=True, show=False).merged_dir


@pytest.mark.parametrize(
    ("config", "generation"),
    [
        ({}, None),
        ({"eos_token_id": END_OF_TEXT, "bos_token_id": END_OF_TEXT}, None),
        (
            {"eos_token_id": END_OF_TEXT},
            {"eos_token_id": END_OF_TEXT, "pad_token_id": None},
        ),
        ({"eos_token_id": [END_OF_TEXT]}, {"eos_token_id": [END_OF_TEXT, 380], "do_sample": False}),
    ],
    ids=["nothing", "config", "generation_config", "lists"],
)
def test_generation_ends_at_the_trained_end_of_turn(tmp_path, config, generation):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged_dir = write_merged(tmp_path, config=config, generation=generation)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged_dir), AutoTokenizer.from_pretrained(merged_dir)
    own = load_tokenizer(tmp_path / "base", chat_template="chatml")
    assert tokenizer.eos_token == CHATML.end_of_turn and tokenizer.eos_token_id == own.end_of_turn_id
    ids = model.generation_config.eos_token_id
    assert ids == model.config.eos_token_id and ids[:2] == [own.end_of_turn_id, END_OF_TEXT]
    assert model.generation_config.pad_token_id == own.pad_id
    question = [{"role": "user", "content": "When does the ferry leave?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**prompt, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert said.tolist().index(own.end_of_turn_id) == len(said) - 1 < MAX_NEW_TOKENS - 1
