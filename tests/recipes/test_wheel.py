"""The wheel alone, in its own environment and folder: from a JSONL file to a GGUF."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from gguf import GGUFReader

from tests.conftest import REPOSITORY, make_run_arguments

BUILD = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-c", BUILD, str(folder)]
    built = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return folder / built.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def program(wheel, tmp_path_factory) -> Path:
    """Return the program tune2gguf of an environment with the wheel and this environment's other packages."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    scheme = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", vars=scheme))
    # Added as a plain folder: its .pth files, such as one of an editable tune2gguf, are not read.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    scripts = Path(sysconfig.get_path("scripts", vars=scheme))
    python = scripts / Path(sys.executable).name
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, "--disable-pip-version-check", str(wheel)], check=True)
    return scripts / "tune2gguf"


def run(program: Path, folder: Path, *arguments: object) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(program), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_holds_what_is_listed_and_no_recipes_of_torchtunes_name(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {name.removeprefix("tune2gguf/shipped/") for name in names if name.startswith("tune2gguf/shipped/")}
    configs = {path.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.glob("configs/*/*.yaml")}
    assert configs | {"recipes/lora_finetune.py", "examples/quickstart/train.jsonl"} <= shipped
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"tune2gguf", "tune2gguf.pth"}


def test_wheel_goes_from_rows_to_a_gguf_in_an_empty_folder(program, tiny_base, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    assert "configs/llama3_2_1b/lora.yaml" in run(program, folder, "ls").splitlines()
    assert run(program, folder, "cp", "examples/quickstart/lora.yaml", "my.yaml") == "my.yaml\n"
    _, _, *overrides = make_run_arguments(tmp_path, tiny_base)
    rows = next(word for word in overrides if word.startswith("dataset.files="))
    look = ("--base-dir", tiny_base, "--chat-template", "chatml")
    assert "20 rows" in run(program, folder, "inspect", rows.partition("=")[2].strip("[]"), *look)
    printed = run(program, folder, "run", "--config", "my.yaml", *overrides, "output_dir=runs/mine")
    assert "its GGUF: tune2gguf export runs/mine" in printed
    run(program, folder, "export", "runs/mine", "--quantization", "F32", "--proof-rows", "0")
    tensors = GGUFReader(folder / "runs/mine/export/mine-F32.gguf").tensors
    assert {"token_embd.weight", "blk.0.attn_q.weight"} <= {tensor.name for tensor in tensors}
    assert run(program, folder, "chat", "runs/mine", "--once", "When?", "--max-tokens", "3").strip()


def test_configs_of_the_wheel_are_found_by_their_names(program, tmp_path):
    said = run(program, tmp_path, "estimate", "--config", "configs/llama3_2_1b/lora.yaml", "device=cpu")
    assert said.startswith("rows of up to 2048 tokens")
