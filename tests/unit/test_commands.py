"""Names that YAML or a shell would misread: typed ones arrive unchanged, and printed commands run."""

import ast
import re
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.conftest import REPOSITORY
from tests.unit.run_folders import ENVIRONMENT
from tests.unit.test_advice import CURVES
from tune2gguf.commands import format_command, format_overrides
from tune2gguf.config import check_values, read_config
from tune2gguf.files.atomic import write_json
from tune2gguf.machine.fit import _to_command
from tune2gguf.report.run import _make_command
from tune2gguf.runs.checkpoints import describe_damage
from tune2gguf.runs.config_file import flatten_config, write_config
from tune2gguf.runs.folder import describe_existing, find_path_problems
from tune2gguf.runs.run import Run
from tune2gguf.serve.chat import open_chat_model
from tune2gguf.sweep import list_points
from tune2gguf.verdict.advice import Situation, advise
from tune2gguf.verdict.judge import GOOD_FIT, INCONCLUSIVE, OVERFITTING, UNDERFITTING, Verdict

QUICKSTART = REPOSITORY / "examples/quickstart/lora.yaml"
NAMES = (
    "exp #2", "#1", "a: b", "a:b", ": x", "- x", "-rf", "--config", "~", "~root", "~x", "2024", "010", "0x1F", "1e3",
    "1_000", "12:30:45", "2024-11-28", ".5", ".inf", ".nan", "yes", "No", "on", "true", "false", "null", "None",
    "auto", "a b", " lead", "trail ", "a,b", "[x]", "{x}", "[", "'q'", '"q"', "it's", 'say "hi"', "back\\slash",
    "C:\\new\\u0041", "$HOME", "${x}", "${oc.env:HOME}", "\\${x}", "end\\", "a=b", "=", "%s", "&a", "*a", "!x", "?x",
    "@x", "`x`", "|x", ">x", "a;b", "a&b", "(x)", "new\nline", "tab\tx", "Fähre \U0001f6a2", "next\u0085line",
    "a\u2028b", "???", "x'\"$(exit 3)",
)  # fmt: skip

# Text typed after output_dir= -> name of the folder, or the error.
TYPED = {
    "exp #2": "exp #2",
    "a: b": "a: b",
    "2024": "2024",
    "010": "010",
    "1_000": "1_000",
    "yes": "yes",
    "2024-11-28": "2024-11-28",
    "12:30:45": "12:30:45",
    "1e3": "1e3",
    "[x]": "[x]",
    "{x}": "{x}",
    "a, b": "a, b",
    "*x": "*x",
    "&x y": "&x y",
    "!x": "!x",
    "%x": "%x",
    "@x": "@x",
    "'": "'",
    "it's": "it's",
    '"a" #2': '"a" #2',
    '"exp #2"': "exp #2",
    "'exp #2'": "exp #2",
    '"null"': "null",
    "- x": "- x",
    "a=b": "a=b",
    "back\\slash": "back\\slash",
    "\\${x}": "${x}",
    "runs/${seed}": "runs/42",
    "${nothing}": "the config does not resolve: Interpolation key 'nothing' not found",
    "${": "cannot be read as YAML with these overrides",
    "null": "output_dir is empty; it needs a value",
    "": "output_dir is empty; it needs a value",
    "  ": "output_dir is empty; it needs a value",
    "???": "overrides are written key=value",
}


@pytest.mark.parametrize(("typed", "expected"), TYPED.items(), ids=map(repr, TYPED))
def test_text_that_is_typed_stays_text(typed, expected):
    try:
        config = read_config(QUICKSTART, [f"output_dir={typed}"])
        check_values(config)
        found = config.output_dir
    except ValueError as error:
        found = str(error)
        assert "\n" not in found and expected in found
        return
    assert found == expected


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("[a #2.jsonl]", "[a #2.jsonl]"),
        ('["a #2.jsonl",b.jsonl]', ["a #2.jsonl", "b.jsonl"]),
        ("a #2.jsonl", "a #2.jsonl"),
        ("[2024,010,yes,null,~x]", ["2024", "010", "yes", "null", "~x"]),
        ("2024", "2024"),
        ("a, b.jsonl", "a, b.jsonl"),
        ("null", None),
        ("[data/*.jsonl, hub:o/n:train]", ["data/*.jsonl", "hub:o/n:train"]),
    ],
)
def test_files_that_are_typed_stay_text(typed, expected):
    for key in ("files", "validation_files"):
        found = read_config(QUICKSTART, [f"dataset.{key}={typed}"]).dataset[key]
        found = OmegaConf.to_container(found) if OmegaConf.is_list(found) else found
        assert found == expected


def test_numbers_and_switches_are_still_yaml():
    config = read_config(
        QUICKSTART, ["epochs=5", "learning_rate=1e-3", "compile=true", "resume=false", "parent_run=null"]
    )
    assert (config.epochs, config.learning_rate, config.compile) == (5, 0.001, True)
    assert config.resume is False and config.parent_run is None
    assert read_config(QUICKSTART, ["resume=auto"]).resume == "auto"
    assert read_config(QUICKSTART, ["model.lora_attn_modules=[q_proj]"]).model.lora_attn_modules == ["q_proj"]


@pytest.mark.parametrize(
    "value", [1024.0, 128.5, 0.1 + 0.2, 1e-5, 1.5e-5, 2e-4, 1 / 3, 1e22, 5e-324, 0.0, 3, -0.0005, 7e-4]
)
def test_numbers_are_printed_whole(value):
    (word,) = format_overrides({"lora_alpha": value})
    assert read_config(QUICKSTART, [word]).lora_alpha == value
    assert type(OmegaConf.from_dotlist([word]).lora_alpha) is type(value)


@pytest.fixture
def run_in_shell(tmp_path):
    """Return the arguments that the programs of a line get; nothing else is on PATH."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("tune", "python"):
        (programs / name).write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
        (programs / name).chmod(0o755)

    def run(command: str) -> list[str]:
        finished = subprocess.run(
            ["/bin/sh", "-c", command], env={"PATH": str(programs), "HOME": "/wrong"}, capture_output=True, check=True
        )
        assert not finished.stderr
        return finished.stdout.decode().split("\0")[:-1]

    return run


def read_words(words: list[str]):
    """Return the config of a run command's words, as the recipe reads them."""
    from tune2gguf.config import load_config

    assert words[:2] == ["run", "recipes/lora_finetune.py"]
    return load_config(words[2:])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES, ids=map(repr, NAMES))
def test_printed_commands_run_as_they_are_printed(name, tmp_path, monkeypatch, run_in_shell):
    """Every printed command holds this name: advice, larger model, existing or damaged run, export."""
    monkeypatch.chdir(tmp_path)
    for folder in ("configs", "recipes"):  # as in the checkout
        Path(folder).symlink_to(REPOSITORY / folder)
    run_dir = Path(name)
    run_dir.mkdir()
    files = [f"{name}.jsonl", "plain.jsonl"]
    own = {"output_dir": run_dir, "dataset.files": files, "dataset.validation_files": files[0], "lora_alpha": 1024.5}
    config = read_config(QUICKSTART, format_overrides(own))
    assert config.output_dir == as_path(name) and list(config.dataset.files) == list(map(as_path, files))
    write_config(run_dir, config)
    resolved = OmegaConf.to_container(config, resolve=True)
    data = {"training": {"rows": 90}, "validation": {"rows": 10}, "rows_truncated": []}
    free = [f"{name}-{number}" for number in range(2, 10)]
    situation = Situation(str(run_dir), resolved, data, free)
    for label, figures in ((OVERFITTING, {}), (UNDERFITTING, {}), (INCONCLUSIVE, {"rows_needed": 30}), (GOOD_FIT, {})):
        for one in advise(Verdict(label, ("because",), figures), CURVES, situation):
            for part in one.command.split(" && ") if label == GOOD_FIT else [one.command]:
                check_command(run_in_shell(part), one.changes, situation)
    for text in (describe_existing(run_dir), next(find_path_problems(False, run_dir))):
        (word,) = run_in_shell(f"tune {text.partition('another name: ')[2]}")
        assert read_config(QUICKSTART, [word]).output_dir == as_path(f"{name}-2")
    (run_dir / "checkpoints" / "step_1").mkdir(parents=True)
    (problem,) = find_path_problems(str(run_dir / "checkpoints" / "step_1"), Path("elsewhere"))
    (word,) = run_in_shell(f"tune {problem.partition('with its run: ')[2]}")
    assert read_config(QUICKSTART, [word]).output_dir == as_path(name)

    with pytest.raises(ValueError) as no_export:
        open_chat_model(Run(run_dir), gguf_path=None, uses_adapter=False, num_threads=None)
    (script, folder) = run_in_shell(str(no_export.value).partition("First:")[2].strip(" \n"))
    assert script == "scripts/export.py" and Path(folder) == run_dir and folder[0] not in "-~"
    for point in list_points(["lora_alpha=1,2"], run_dir):
        assert read_config(QUICKSTART, point.overrides).output_dir == as_path(str(point.run_dir))


def test_the_report_goes_on_with_the_words_that_began_the_run(tmp_path, run_in_shell):
    """They are quoted once, for the shell: YAML's quotes were typed by the user."""
    typed = ["--config", "a b.yaml", *format_overrides({"output_dir": "exp #2: ${x}"}), "resume=false", "seed=7"]
    write_json(tmp_path / "environment.json", {**ENVIRONMENT, "command": ["lora_finetune.py", *typed]})
    command = _make_command(Run(tmp_path), "resume=auto")
    expected = [word for word in typed if word != "resume=false"]
    assert run_in_shell(command) == ["run", "recipes/lora_finetune.py", *expected, "resume=auto"]


def test_what_would_make_a_run_fit_is_typed_as_it_is_printed(run_in_shell):
    words = run_in_shell(f"tune {_to_command({'base_weights': 'nf4', 'enable_activation_checkpointing': True})}")
    config = read_config(QUICKSTART, words)
    assert (config.base_weights, config.enable_activation_checkpointing) == ("nf4", True)


def test_no_command_is_put_together_by_hand():
    """In an f-string, a value after `python scripts/x.py`, `ollama create` or `--config` would not be quoted."""
    found = []
    for path in [
        *REPOSITORY.glob("tune2gguf/**/*.py"),
        *REPOSITORY.glob("recipes/*.py"),
    ]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else ()
            for part, value in pairwise(parts):
                is_text = isinstance(part, ast.Constant) and isinstance(value, ast.FormattedValue)
                if is_text and re.search(r"(python scripts/\S+|ollama create|--config) ?$", part.value):
                    found.append(f"{path}, line {node.lineno}")
    assert not found


def as_path(name: str) -> str:
    return f"./{name}" if name[0] in "-~" or name == "???" else name


def check_command(words: list[str], changes: dict, situation: Situation) -> None:
    if words[0] != "run":
        assert words[0].startswith("scripts/")
        assert words[1] == "--config" or (Path(words[1]) == Path(situation.run_dir) and words[1][0] not in "-~")
        return
    config = flatten_config(OmegaConf.to_container(read_words(words), resolve=True))
    assert config["output_dir"] in map(as_path, situation.free_dirs)
    if "configs/" not in words[3]:
        assert config["parent_run"] == as_path(situation.run_dir)
    for key, value in changes.items():
        value = list(map(as_path, value)) if isinstance(value, list) else value
        assert config[key] == (as_path(value) if key == "dataset.validation_files" and value else value)


def test_a_damaged_checkpoint_names_the_good_one_as_a_command(tmp_path, monkeypatch, run_in_shell):
    from tune2gguf.runs.checkpoints import Checkpoint, write_checkpoint

    monkeypatch.chdir(tmp_path)
    for step in (1, 2):
        checkpoint = Checkpoint({}, {}, {}, {})
        write_checkpoint(Path(f"a #1/checkpoints/step_{step}"), checkpoint)
    message = describe_damage(Path("a #1/checkpoints/step_2"), "cut")
    (word,) = run_in_shell(f"tune {message.partition('from there: ')[2]}")
    assert read_config(QUICKSTART, [word]).resume == "a #1/checkpoints/step_1"


def test_paths_expand_the_home_folder_under_every_key(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = ("output_dir", "base_dir", "parent_run", "resume", "dataset.files", "dataset.validation_files")
    config = read_config(QUICKSTART, [f"{key}=~/a" for key in keys])
    flat = flatten_config(OmegaConf.to_container(config, resolve=True))
    for key in (*keys, "model.base_dir", "tokenizer.base_dir"):
        assert flat[key] == str(tmp_path / "a"), key
    listed = read_config(QUICKSTART, ["dataset.files=[~/a.jsonl,hub:o/n,b/~c]"]).dataset.files
    assert listed == [str(tmp_path / "a.jsonl"), "hub:o/n", "b/~c"]
    logged = read_config(QUICKSTART, ["metric_logger.log_dir=~/log"]).metric_logger.log_dir
    assert logged == str(tmp_path / "log")


@pytest.mark.parametrize("command", sorted(REPOSITORY.glob("tune2gguf/cli/[a-z]*.py")), ids=lambda path: path.name)
def test_paths_of_commands_expand_the_home_folder(command):
    text = command.read_text()
    assert "type=Path" not in text
    assert command.stem == "ls" or len(re.findall("expand_path|find_config", text)) > 1


def test_what_the_environment_says_is_kept_for_later_readers(tmp_path, monkeypatch):
    from tune2gguf.runs.config_file import read_config as read_run_config

    monkeypatch.setenv("RUNS", "/data/${x}")
    monkeypatch.setenv("KEY", "secret")
    logger = ["metric_logger.api_key=${oc.env:KEY}", "metric_logger.log_dir=${output_dir}"]
    overrides = ["output_dir=${oc.env:RUNS}/a", 'dataset.files=["${oc.env:RUNS}/b.jsonl"]', "seed=7", *logger]
    write_config(tmp_path, read_config(QUICKSTART, overrides))
    monkeypatch.delenv("RUNS")
    monkeypatch.delenv("KEY")
    found = read_run_config(tmp_path)
    assert found["output_dir"] == "/data/${x}/a" and found["dataset"]["files"] == ["/data/${x}/b.jsonl"]
    assert found["model"]["lora_rank"] == 16 and "secret" not in (tmp_path / "config.yaml").read_text()
    assert read_config(tmp_path / "config.yaml", ["lora_rank=8"]).model.lora_rank == 8, "references stay"


def test_an_environment_that_is_gone_is_said_in_one_line():
    with pytest.raises(ValueError) as refused:
        read_config(QUICKSTART, ["output_dir=${oc.env:NOT_THERE}/a"])
    assert "'NOT_THERE' not found" in str(refused.value) and "\n" not in str(refused.value)


def test_a_path_is_never_taken_for_an_option():
    assert format_command("python", "scripts/export.py", Path("-x")) == "python scripts/export.py ./-x"
    assert format_command("python", Path("~/a b")) == "python './~/a b'"
