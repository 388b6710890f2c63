"""The README's commands, verbatim, in processes of their own with the installed torchtune."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

RECIPE = "recipes/lora_finetune.py"
SCRIPTS = Path(sys.executable).parent
YAMLS = sorted(REPOSITORY.glob("configs/**/*.yaml")) + sorted(REPOSITORY.glob("examples/**/*.yaml"))


def run_command(command: list[str], *, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess:
    """Run with this Python's scripts first on PATH, one thread per process."""
    environment = {**os.environ, "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "launcher",
    [
        ["tune", "run", RECIPE],
        ["tune", "run", "--nproc_per_node", "2", RECIPE],
        ["torchrun", "--nproc_per_node", "2", RECIPE],
        ["python", RECIPE],
    ],
    ids=" ".join,
)
def test_launcher_trains_and_fills_the_run_folder(launcher, run_arguments, tmp_path):
    done = run_command([*launcher, *run_arguments, "epochs=1", "lora_rank=8"])
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "tiny"
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    adapters = {f"{name}/adapter_{part}" for name in ("last", "best") for part in ("config.json", "model.safetensors")}
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    num_processes = 2 if "2" in launcher else 1
    num_steps = -(-20 // (4 * num_processes))
    assert len([record for record in records if "loss" in record]) == num_steps
    parts = ("adapter_config.json", "adapter_model.safetensors", "manifest.json", "progress.json", "state.pt")
    checkpoints = {f"checkpoints/step_{step}/{part}" for step in (num_steps - 1, num_steps) for part in parts}
    files = {"config.yaml", "environment.json", "data.json", "heldout.jsonl", "metrics.jsonl", "plan.json"}
    files |= {"calibration.jsonl", "verdict.json", "report.html"}
    assert written == files | adapters | checkpoints
    assert [record["val_rows"] for record in records if "val_loss" in record] == [5, 5, 5, 5]
    assert json.loads((folder / "last/adapter_config.json").read_text())["r"] == 8
    assert f"wrote {folder}" in done.stdout


@pytest.mark.parametrize("yaml", YAMLS, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_tune_validate_accepts_every_yaml(yaml):
    done = run_command(["tune", "validate", str(yaml)])
    assert (done.returncode, done.stdout.strip()) == (0, "Config is well-formed!"), done.stderr


def test_every_model_has_its_yaml():
    assert {path.relative_to(REPOSITORY).as_posix() for path in YAMLS} == {
        "configs/llama3_1_8b/lora.yaml",
        "configs/llama3_1_8b/qlora.yaml",
        "configs/llama3_2_1b/lora.yaml",
        "configs/llama3_2_1b/qlora.yaml",
        "configs/llama3_2_3b/lora.yaml",
        "configs/llama3_2_3b/qlora.yaml",
        "examples/quickstart/lora.yaml",
    }


def test_from_another_directory_one_sentence_says_where_to_go(run_arguments, tmp_path):
    done = run_command(["tune", "run", RECIPE, *run_arguments], cwd=tmp_path)
    assert done.returncode != 0
    assert (
        done.stderr.strip()
        == f"{RECIPE}: not found in {tmp_path}. Run the command from the root of the tune2gguf checkout."
    )


def test_without_the_package_one_sentence_says_how_to_install_it(run_arguments, tmp_path):
    shutil.copytree(REPOSITORY / "recipes", tmp_path / "recipes")
    without_site = [sys.executable, "-S", RECIPE, *run_arguments]
    done = run_command(without_site, cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.strip().startswith("tune2gguf is not installed in this Python.")
    assert "Traceback" not in done.stderr


def test_start_of_python_does_not_import_torch():
    done = run_command(
        [sys.executable, "-c", "import sys; print('tune2gguf._local_recipes' in sys.modules, 'torch' in sys.modules)"]
    )
    assert done.stdout.strip() == "True False", done.stderr
