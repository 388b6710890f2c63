"""The program tune2gguf: it lists, copies and starts."""

import json
import subprocess
import sys
from importlib import import_module

import pytest

from tests.conftest import REPOSITORY
from tune2gguf.cli.run import split_arguments
from tune2gguf.commands import SUBCOMMANDS, find_config, format_run, format_script, list_shipped


def run_cli(*arguments: str, folder=REPOSITORY) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tune2gguf", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_every_command_is_a_module_and_every_script_calls_one():
    assert all(import_module(f"tune2gguf.cli.{module}").main for module in SUBCOMMANDS.values())
    scripts = {path.stem for path in REPOSITORY.glob("scripts/*.py")}
    assert scripts == {*SUBCOMMANDS.values(), "make_random_base"} - {"ls", "cp", "run"}
    for name in scripts:
        assert f'run_command("{name}")' in (REPOSITORY / "scripts" / f"{name}.py").read_text()


def test_help_names_every_command_and_a_wrong_one_is_refused_with_them():
    found = run_cli("--help")
    assert all(f"\n  {name} " in found.stdout for name in SUBCOMMANDS)
    wrong = run_cli("exprot")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: unknown command 'exprot'; known are ls, cp, download")


# What is typed, and what is said about it. A wrong key is missing here: a component's keys are those of its signature,
# which is imported with torch.
MISTAKES = {
    "download --config {config} base_source=null": "needs base_dir and base_source",
    "inspect {nowhere} --base-dir {nowhere}": "no such file",
    "estimate --config {nowhere}": "no such config",
    "sweep --config {config} lora_rank=3": "nothing to sweep",
    "report {nowhere}": "no such folder",
    "compare {nowhere}": "not the folder of a run",
    "remind {nowhere}": "not the folder of a run",
    "export {nowhere}": "not the folder of a run",
    "show {nowhere}": "not found",
    "chat {nowhere}": "not the folder of a run",
}


def test_a_mistake_is_reported_before_torch_is_loaded(tmp_path):
    program = """
import json, sys
from tune2gguf.cli import main
for words in json.loads(sys.argv[1]):
    sys.argv = ["tune2gguf", *words]
    try:
        said = main()  # None
    except SystemExit as end:
        said = str(end)
    print(json.dumps([said, "torch" in sys.modules]))
"""
    places = {"config": REPOSITORY / "configs/llama3_2_1b/lora.yaml", "nowhere": tmp_path / "nowhere"}
    words = json.dumps([typed.format(**places).split() for typed in MISTAKES])
    done = subprocess.run([sys.executable, "-c", program, words], capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for (typed, expected), (said, loaded_torch) in zip(MISTAKES.items(), found, strict=True):
        assert expected in (said or "no error") and not loaded_torch, (typed, said, done.stderr)


def test_cp_copies_a_file_or_a_folder_and_overwrites_nothing(tmp_path):
    name = "configs/llama3_2_1b/lora.yaml"
    assert run_cli("cp", name, str(tmp_path)).stdout == f"{tmp_path / 'lora.yaml'}\n"
    assert (tmp_path / "lora.yaml").read_bytes() == (REPOSITORY / name).read_bytes()
    again = run_cli("cp", name, str(tmp_path))
    assert again.returncode == 1 and "exists already and is not overwritten" in again.stderr
    (tmp_path / "lora.yaml").write_text("mine")
    assert run_cli("cp", name, str(tmp_path), "--force").returncode == 0
    assert (tmp_path / "lora.yaml").read_bytes() == (REPOSITORY / name).read_bytes()
    run_cli("cp", "examples/quickstart", str(tmp_path / "q"))
    assert {"lora.yaml", "train.jsonl", "heldout.jsonl"} <= {path.name for path in (tmp_path / "q").iterdir()}
    unknown = run_cli("cp", "pyproject.toml", str(tmp_path))
    assert unknown.returncode == 1 and "does not come with the package; these do:\n  recipes/" in unknown.stderr


@pytest.mark.parametrize(
    ("typed", "launcher", "words"),
    [
        (["--config", "c.yaml", "a=1"], [], ["--config", "c.yaml", "a=1"]),
        (["a=1", "--config=c.yaml"], [], ["--config", "c.yaml", "a=1"]),
        (["--nproc_per_node", "2", "--config", "c.yaml"], ["--nproc_per_node", "2"], ["--config", "c.yaml"]),
        (["--nproc-per-node=2", "--config", "c.yaml", "b=2"], ["--nproc-per-node=2"], ["--config", "c.yaml", "b=2"]),
    ],
)
def test_options_before_the_config_are_torchruns(typed, launcher, words):
    assert split_arguments(typed) == (launcher, words)


def test_a_config_that_is_there_goes_before_the_packages_own_of_that_name(tmp_path, monkeypatch):
    name = "configs/llama3_2_1b/lora.yaml"
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == REPOSITORY / name
    own = tmp_path / name
    own.parent.mkdir(parents=True)
    own.touch()
    assert find_config(name).resolve() == own
    assert str(find_config("configs/nope.yaml")) == "configs/nope.yaml"
    assert all((REPOSITORY / path).is_file() for path in list_shipped())


def test_commands_are_printed_as_they_run_where_the_user_is(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert format_script("show_result", "runs/a b") == "python scripts/show_result.py 'runs/a b'"
    expected = "tune run --nproc_per_node 2 recipes/lora_finetune.py --config c.yaml"
    assert format_run("--config", "c.yaml", num_processes=2) == expected
    monkeypatch.chdir(tmp_path)
    assert format_script("show_result", "runs/a b") == "tune2gguf show 'runs/a b'"
    assert format_run("--config", "c.yaml", num_processes=2) == "tune2gguf run --nproc_per_node 2 --config c.yaml"
