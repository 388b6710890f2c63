"""Runs on data in several formats: trained as the config says, recorded, and equal after a resume."""

import json

from recipes.lora_finetune import recipe_main
from tests.conftest import SENTENCES, make_conversations, write_rows
from tests.recipes.test_training import measure_difference, run_recipe
from tune2gguf.commands import format_overrides
from tune2gguf.runs.validation_rows import read_validation_rows

assert recipe_main is not None, "run_recipe calls it"


def test_run_on_chats_columns_and_split_texts_is_recorded_and_resumed(tmp_path, run_arguments, monkeypatch):
    chats = write_rows(tmp_path / "chats.jsonl", make_conversations(12))
    pairs = write_rows(
        tmp_path / "pairs.jsonl",
        [{"question": f"And {number}?", "hint": "Fog." * (number % 2), "answer": "No."} for number in range(8)],
    )
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": f"Log {n}. " + " ".join(SENTENCES * 4)} for n in range(6)])
    sources = [
        {"files": str(chats), "weight": 2, "validation_split": 0.25},
        {"files": [str(pairs)], "prompt": "{question}\n{hint}", "columns": {"completion": "answer"}, "rows": 4},
        {"files": [str(texts)], "validation_split": 0.3},
    ]
    options = {"dataset.sources": sources, "dataset.files": None, "dataset.validation_files": None}
    options |= {"dataset.on_long_row": "split", "max_seq_len": 128, "max_val_rows": None}
    own = [*run_arguments, *format_overrides(options)]
    run_recipe([*own, "epochs=2", f"output_dir={tmp_path / 'whole'}"], monkeypatch)
    ledger = json.loads((tmp_path / "whole" / "data.json").read_text())
    assert ledger["read"] == 26 == ledger["trained"] + ledger["validated"] + ledger["dropped"] + ledger["not_drawn"]
    assert ledger["not_drawn"] == 4 and len(ledger["rows_split"]) == 6
    assert ledger["sources"][0]["rows_per_epoch"] == 2 * ledger["sources"][0]["trained"]
    heldout = read_validation_rows(tmp_path / "whole")
    assert len(heldout) == ledger["validation"]["rows"] > ledger["validated"]
    assert any(row.first_token for row in heldout)

    run_recipe([*own, "epochs=1", f"output_dir={tmp_path / 'longer'}", "scheduler=constant"], monkeypatch)
    run_recipe(
        [*own, "epochs=2", f"output_dir={tmp_path / 'longer'}", "scheduler=constant", "resume=auto"], monkeypatch
    )
    run_recipe([*own, "epochs=2", f"output_dir={tmp_path / 'at once'}", "scheduler=constant"], monkeypatch)
    assert measure_difference(tmp_path / "longer", tmp_path / "at once") == 0
