"""Printed output works in any encoding, and a closed pipe ends our programs like any other."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, make_conversations, write_rows
from tune2gguf.export.pipeline import export_run
from tune2gguf.runs.run import Run

SCRIPTS = sorted(path.name for path in (REPOSITORY / "scripts").glob("*.py"))


@pytest.fixture(scope="module")
def run_dir(hostile_run, tmp_path_factory) -> Path:
    """Return an exported run with a name and rows that are not ASCII."""
    run_dir = Path(shutil.copytree(hostile_run, tmp_path_factory.mktemp("runs") / hostile_run.name))
    export_run(run_dir, quantizations=["F32"], show=False)
    return run_dir


def make_command(name: str, run_dir: Path, folder: Path) -> list[str]:
    """Return a script's command with much output."""
    rows = make_conversations(30)
    rows[0]["messages"][0]["content"] = "\u65e5\u672c\u2028\U0001f6a2 \ud83d"[:-1] + " ?"
    data = write_rows(folder / "d\u00e4ta.jsonl", rows)
    config = str(REPOSITORY / "examples/quickstart/lora.yaml")
    arguments = {
        "chat.py": [run_dir, "--once", "When?", "--max-tokens", "8"],
        "compare_runs.py": [run_dir, "--html", folder / "c.html"],
        "download.py": ["--config", config, "base_dir=b\u00e4se", "base_source=n\u00f6thing"],
        "estimate_memory.py": ["--config", config, "model.architecture=smollm2_135m"],
        "export.py": [run_dir, "--quantization", "F32", "--force", "--proof-rows", "0"],
        "inspect_data.py": [data, "--base-dir", folder / "base", "--chat-template", "chatml", "--rows", "30"],
        "make_general_rows.py": ["--help"],
        "make_random_base.py": ["--help"],
        "report.py": [run_dir],
        "show_result.py": [run_dir],
        "sweep.py": ["--config", config, "--out", folder / "sw\u00e9ep", "epochs=1", "seed=1"],
    }[name]
    if name == "inspect_data.py":
        (folder / "base").symlink_to(Run(run_dir).base_dir)
    return [sys.executable, str(REPOSITORY / "scripts" / name), *map(str, arguments)]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_script_prints_in_any_encoding(name, encoding, run_dir, tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "OMP_NUM_THREADS": "1"}
    command = make_command(name, run_dir, tmp_path)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    said = (done.stdout + done.stderr).decode(encoding)
    assert "Traceback" not in said and "codec can't" not in said, said
    assert (done.returncode != 0) == (name in ("download.py", "sweep.py")), said
    assert said.strip()


@pytest.mark.parametrize("name", SCRIPTS)
def test_reader_that_stops_reading_ends_a_script_without_a_word(name, run_dir, tmp_path):
    if name in ("download.py", "sweep.py"):
        pytest.skip("what they print here goes to stderr")
    command = make_command(name, run_dir, tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}
    for unbuffered in ("", "1"):
        reading, writing = os.pipe()
        os.close(reading)
        environment["PYTHONUNBUFFERED"] = unbuffered
        done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=writing, stderr=subprocess.PIPE)
        os.close(writing)
        # argparse prints the help of make_random_base.py, and ignores a closed pipe.
        assert done.stderr.decode() == "" and done.returncode in ((0, 141) if "--help" in command else (141,))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_recipe_prints_in_any_encoding(run_arguments, encoding, tmp_path):
    folder = tmp_path / "F\u00e4hre \U0001f6a2"
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "recipes/lora_finetune.py", *run_arguments, f"output_dir={folder}"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode(encoding)
    assert (folder / "verdict.json").is_file() and b"hre " in done.stdout
