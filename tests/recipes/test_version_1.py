"""A run folder of an earlier version: all of it is readable, and a resume is refused with the reason."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.runs import run_recipe
from tune2gguf.export.pipeline import export_run
from tune2gguf.files.atomic import write_json
from tune2gguf.files.json_files import read_json
from tune2gguf.report.compare import find_runs, group_runs
from tune2gguf.runs.files import ENVIRONMENT_FILE, FOLDER_VERSION
from tune2gguf.runs.run import Run, open_run
from tune2gguf.serve.chat import open_chat_model
from tune2gguf.serve.proof import ADAPTER, prove_export

OLD = REPOSITORY / "tests/data/run_of_version_1"
RUN = Path("runs/old")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Change to the run's original working directory: its config's paths are relative."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_is_not_gone_on_with_amid_an_epoch_whose_rows_were_ordered_otherwise(folder):
    before = {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()}
    command = [
        sys.executable,
        str(REPOSITORY / "recipes/lora_finetune.py"),
        "--config",
        str(RUN / "config.yaml"),
        "resume=auto",
    ]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "what differs:\n  row order: the checkpoint is from an earlier tune2gguf, " in done.stderr
    assert {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()} == before


def test_what_it_did_not_record_of_its_rows_is_recorded_when_it_goes_on(folder):
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_bytes().decode().split("\n")[:-1]]
    assert "system_prompt" not in Run(RUN).data and rows[0]["messages"][0]["role"] == "user"
    shutil.rmtree(RUN / "checkpoints")  # it starts again
    run_recipe("--config", str(RUN / "config.yaml"), "resume=auto")
    assert Run(RUN).data["system_prompt"] is None and Run(RUN).data["trained"] == len(rows)


def test_export_proof_and_chat_read_it(folder):
    exported = export_run(RUN, quantizations=["F16"], show=False)
    proof = prove_export(exported, num_replies=1, show=False)
    tokens = proof.served_by_llama_cpp["F16"]["tokens"]
    assert (tokens["num_equal"], tokens["num_different"]) == (5, 0)
    assert proof.steps[ADAPTER]["loss"] == pytest.approx(Run(RUN).curves.best.loss, abs=1e-4)
    assert open_run(RUN).system_prompt is None
    for uses_adapter in (False, True):
        model = open_chat_model(open_run(RUN), uses_adapter=uses_adapter)
        assert model.chat([{"role": "user", "content": "When?"}], max_tokens=4, temperature=0.0).num_reply_tokens > 0


def test_report_and_comparison_read_it(folder):
    command = [sys.executable, str(REPOSITORY / "scripts/report.py"), str(RUN)]
    subprocess.run(command, check=True, capture_output=True)
    page = (RUN / "report.html").read_text(encoding="utf-8")
    assert "Not in this report" not in page and "step 7 of 10" in page
    assert "examples/quickstart/lora.yaml" in page and "Question 100: what should I know?" in page
    ((run,),) = (group.runs for group in group_runs(find_runs(Path("runs"))))
    assert (run.name, run.is_finished) == ("old", False)


def test_a_folder_of_a_newer_version_is_refused_in_a_line(folder):
    path = RUN / ENVIRONMENT_FILE
    write_json(path, {**read_json(path), "version": 99})
    message = f"{RUN}: its files have version 99, this tune2gguf reads up to {FOLDER_VERSION}; update tune2gguf"
    with pytest.raises(ValueError) as refused:
        _ = Run(RUN).environment
    assert str(refused.value) == message
    with pytest.raises(ValueError, match="version 99"):
        open_run(RUN)
    assert json.loads(path.read_text())["version"] == 99
