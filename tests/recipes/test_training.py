"""Training: the same step in any passes, the same bytes for the same seed, errors before the model is loaded."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from recipes.lora_finetune import recipe_main
from tests.conftest import REPOSITORY, make_conversations, write_rows
from tests.recipes.test_commands import run_command
from tune2gguf.model.attention import Rows, lay_out_rows


def run_recipe(arguments: list[str], monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lora_finetune.py", *arguments])
    recipe_main()


def read_adapter(run_folder: Path, which: str = "last") -> dict[str, np.ndarray]:
    return load_file(run_folder / which / "adapter_model.safetensors")


def read_records(run_folder: Path, key: str) -> list[dict]:
    records = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if key in record]


def measure_difference(first: Path, second: Path) -> float:
    first, second = read_adapter(first), read_adapter(second)
    assert first.keys() == second.keys()
    return max(float(np.abs(first[name] - second[name]).max()) for name in first)


def test_a_step_is_the_same_however_its_rows_are_cut(run_arguments, tmp_path, monkeypatch):
    """20 rows in steps of 8: two full steps and one of 4 rows, which two processes share unevenly in batches of 3."""
    cuts = {
        "1x8": ["batch_size=8"],
        "2x4": ["batch_size=4", "gradient_accumulation_steps=2"],
        "uneven": ["batch_size=3", "gradient_accumulation_steps=3"],
    }
    for name, cut in cuts.items():
        run_recipe([*run_arguments, *cut, f"output_dir={tmp_path / name}"], monkeypatch)
    two_processes = ["batch_size=4", f"output_dir={tmp_path / 'two'}"]
    done = run_command(
        ["torchrun", "--nproc_per_node", "2", "recipes/lora_finetune.py", *run_arguments, *two_processes]
    )
    assert done.returncode == 0, done.stderr

    one = read_records(tmp_path / "1x8", "loss")
    assert len(one) == math.ceil(20 / 8)
    for name in ("2x4", "two"):
        assert measure_difference(tmp_path / "1x8", tmp_path / name) < 1e-6
        assert [record["loss"] for record in read_records(tmp_path / name, "loss")] == pytest.approx(
            [record["loss"] for record in one], abs=1e-6
        )
        assert [record["val_loss"] for record in read_records(tmp_path / name, "val_loss")] == pytest.approx(
            [record["val_loss"] for record in read_records(tmp_path / "1x8", "val_loss")], abs=1e-6
        )
    # Negative control: steps of 9 rows are other steps.
    assert measure_difference(tmp_path / "1x8", tmp_path / "uneven") > 1e-5


def test_a_step_is_the_same_however_its_rows_are_laid_out(run_arguments, tmp_path, monkeypatch):
    """One row per pass, like micro-batches of one row, or all rows of the step in one pass."""
    arguments = [*run_arguments, "batch_size=4", "gradient_accumulation_steps=2"]
    for name, tokens in (("alone", "1"), ("few", "120"), ("all", "auto")):
        run_recipe([*arguments, f"tokens_per_pass={tokens}", f"output_dir={tmp_path / name}"], monkeypatch)
    plans = [json.loads((tmp_path / name / "plan.json").read_text()) for name in ("alone", "few", "all")]
    assert plans[0]["tokens_per_pass"] < plans[1]["tokens_per_pass"] < plans[2]["tokens_per_pass"]
    for name in ("few", "all"):
        assert measure_difference(tmp_path / "alone", tmp_path / name) < 1e-6
        for key in ("loss", "val_loss"):
            values, expected = (
                [record[key] for record in read_records(tmp_path / one, key)] for one in (name, "alone")
            )
            assert values == pytest.approx(expected, abs=1e-6)

    # Negative control: rows that see the row before them.
    def lay_out_pairs(lengths: list[int], num_tokens: int) -> Rows:
        return lay_out_rows([sum(lengths[at : at + 2]) for at in range(0, len(lengths), 2)], num_tokens)

    monkeypatch.setattr("tune2gguf.model.llama.lay_out_rows", lay_out_pairs)
    run_recipe([*arguments, f"output_dir={tmp_path / 'mixed'}"], monkeypatch)
    assert measure_difference(tmp_path / "alone", tmp_path / "mixed") > 1e-5


def test_same_seed_gives_identical_bytes_and_another_seed_another_adapter(run_arguments, tmp_path, monkeypatch):
    for name, seed in (("first", 7), ("again", 7), ("other", 8)):
        run_recipe([*run_arguments, "lora_dropout=0.1", f"seed={seed}", f"output_dir={tmp_path / name}"], monkeypatch)
    weights = {name: (tmp_path / name / "last/adapter_model.safetensors").read_bytes() for name in ("first", "again")}
    assert weights["first"] == weights["again"]
    assert measure_difference(tmp_path / "first", tmp_path / "other") > 1e-3


def test_activation_checkpointing_changes_no_byte_of_the_adapter(run_arguments, tmp_path, monkeypatch):
    for name, is_on in (("kept", "false"), ("recomputed", "true")):
        recomputed = [f"enable_activation_checkpointing={is_on}", "lora_dropout=0.1", f"output_dir={tmp_path / name}"]
        run_recipe([*run_arguments, *recomputed], monkeypatch)
    kept, recomputed = (read_adapter(tmp_path / name) for name in ("kept", "recomputed"))
    assert kept.keys() == recomputed.keys()
    assert all(np.array_equal(kept[name], recomputed[name]) for name in kept)


def test_training_lowers_the_validation_loss_and_best_is_its_lowest(run_arguments, tmp_path, monkeypatch):
    run_recipe([*run_arguments, "epochs=6", "learning_rate=0.02"], monkeypatch)
    losses = [record["val_loss"] for record in read_records(tmp_path / "runs/tiny", "val_loss")]
    assert min(losses[1:]) < 0.7 * losses[0]
    assert len(losses) == 7


def test_saved_adapter_gives_the_trained_logits_in_peft(run_arguments, tiny_base, tmp_path, monkeypatch, peft):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    run_recipe([*run_arguments, "epochs=3", "learning_rate=0.02"], monkeypatch)
    folder = tmp_path / "runs/tiny"
    base = transformers.LlamaForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    tuned = peft.PeftModel.from_pretrained(base, folder / "last").eval()
    expected = read_records(folder, "val_loss")[-1]["val_loss"]
    with torch.no_grad():
        assert measure_validation_loss(tuned, tiny_base, tmp_path / "heldout.jsonl") == pytest.approx(
            expected, abs=1e-4
        )
        with tuned.disable_adapter():  # negative control
            assert abs(measure_validation_loss(tuned, tiny_base, tmp_path / "heldout.jsonl") - expected) > 0.1


def test_export_refuses_a_base_that_has_changed_since_the_run(run_arguments, tmp_path, tiny_base, monkeypatch):
    from tune2gguf.export.pipeline import export_run

    run_recipe([*run_arguments, "max_steps_per_epoch=1"], monkeypatch)
    moved = shutil.copytree(tiny_base, tmp_path / "moved")
    assert export_run(tmp_path / "runs/tiny", base_dir=moved, show=False).models[0].gguf_path.is_file()
    content = bytearray((moved / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (moved / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"is not the base that .*tiny was trained on, or it has changed since"):
        export_run(tmp_path / "runs/tiny", base_dir=moved, overwrite=True, show=False)


def measure_validation_loss(model, base_dir: Path, path: Path) -> float:
    import torch

    from tune2gguf.data.columns import RowReader
    from tune2gguf.data.rows import read_rows
    from tune2gguf.tokenizer.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(base_dir, chat_template="chatml")
    total, count = 0.0, 0
    for row in read_rows(str(path)):
        conversation = RowReader().read(row.value, format="openai")
        ids, supervised = tokenizer.encode_conversation(conversation.messages)
        log_probabilities = torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)
        for position in range(1, len(ids)):
            if supervised[position]:
                total -= log_probabilities[position - 1, ids[position]].item()
                count += 1
    return total / count


def run_with_error(arguments: list[str]) -> str:
    """Run a user's command that must fail with one message and no traceback; return the message."""
    done = subprocess.run(
        [sys.executable, "recipes/lora_finetune.py", *arguments], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr and done.stderr.startswith("error: "), done.stderr
    return done.stderr


def test_missing_base_names_the_command_that_gets_it(run_arguments, tmp_path):
    message = run_with_error([*run_arguments, f"base_dir={tmp_path / 'absent'}"])
    assert f"no base model in {tmp_path / 'absent'}" in message and "python scripts/download.py --config" in message


def test_missing_empty_and_malformed_data_files_are_named_with_their_lines(run_arguments, tmp_path):
    missing = run_with_error([*run_arguments, f"dataset.files=[{tmp_path / 'absent.jsonl'}]"])
    assert str(tmp_path / "absent.jsonl") in missing
    (tmp_path / "empty.jsonl").write_text("")
    empty = run_with_error([*run_arguments, f"dataset.files=[{tmp_path / 'empty.jsonl'}]"])
    assert str(tmp_path / "empty.jsonl") in empty and "empty" in empty
    broken = write_rows(tmp_path / "broken.jsonl", make_conversations(3))
    broken.write_text(broken.read_text() + '{"messages": [\n')
    malformed = run_with_error([*run_arguments, f"dataset.files=[{broken}]"])
    assert f"{broken}, line 4" in malformed
    assert not (tmp_path / "runs/tiny").exists()


def test_existing_output_folder_is_kept_and_a_free_name_is_offered(run_arguments, tmp_path):
    (tmp_path / "runs/tiny").mkdir(parents=True)
    (tmp_path / "runs/tiny/precious").write_text("mine")
    message = run_with_error(run_arguments)
    assert f"output_dir={tmp_path / 'runs/tiny-2'}" in message
    assert [path.name for path in (tmp_path / "runs/tiny").iterdir()] == ["precious"]


def test_unknown_key_leads_to_the_nearest(run_arguments):
    message = run_with_error([*run_arguments, "lora_rnk=8", "SchedulerType=linear", "model.lora_rnk=3"])
    assert "unknown config key 'lora_rnk'; did you mean 'lora_rank'?" in message
    assert "unknown config key 'SchedulerType'; did you mean 'scheduler'?" in message
