"""Talking to a run: the exported file and the torch adapter give the same replies; the loop keeps the conversation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.parity.gguf_models import write_biased_base, write_run
from tune2gguf.export.pipeline import export_run
from tune2gguf.runs.run import open_run
from tune2gguf.serve.chat import open_chat_model, talk

QUESTION = "When does the ferry leave?"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """Make a run whose model generates ASCII letters only: every token is text."""
    folder = tmp_path_factory.mktemp("runs")
    base_dir = write_biased_base(folder / "base", lambda token: 0.0 if token.isascii() and token.isalpha() else -30.0)
    run_dir = write_run(base_dir, folder / "ferry", "dtype=fp32", "base_weights=fp32", chat_template="chatml")
    export_run(run_dir, quantizations=["F32"], with_adapter_gguf=True, show=False)
    return run_dir


class Recorder:
    """Feeds lines to `talk` and records its output."""

    def __init__(self, *lines: str) -> None:
        self.lines, self.written = list(lines), []

    def read_line(self) -> str:
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)

    def talk(self, model, **options) -> str:
        options = {"system_prompt": None, "max_tokens": 6, "temperature": 0.0} | options
        talk(model, read_line=self.read_line, write=self.written.append, **options)
        return "".join(self.written)


def ask(model, *turns: str, **options) -> str:
    roles = ("user", "assistant")
    messages = [{"role": roles[place % 2], "content": text} for place, text in enumerate(turns)]
    return model.chat(messages, max_tokens=6, temperature=0.0, on_text=None, **options).text


def test_exported_file_and_torch_adapter_give_the_same_replies(run_dir):
    run = open_run(run_dir)
    exported, trained = open_chat_model(run), open_chat_model(run, uses_adapter=True)
    replies = [ask(exported, text) for text in (QUESTION, "Hello!", "And the dogs?")]
    assert [ask(trained, text) for text in (QUESTION, "Hello!", "And the dogs?")] == replies
    assert len(set(replies)) > 1, "negative control: replies depend on the question"
    beside = open_chat_model(run, uses_adapter_gguf=True)
    assert [ask(beside, text) for text in (QUESTION, "Hello!", "And the dogs?")] == replies


def test_torch_adapter_streams_the_whole_reply(run_dir):
    model = open_chat_model(open_run(run_dir), uses_adapter=True)
    pieces = []
    messages = [{"role": "user", "content": QUESTION}]
    reply = model.chat(messages, max_tokens=12, temperature=0.0, on_text=pieces.append)
    assert reply.text.startswith("".join(pieces)) and len(pieces) > 1
    assert reply.num_reply_tokens == 12 or reply.ended_by_itself


def test_sampling_depends_on_the_seed_alone(run_dir):
    model = open_chat_model(open_run(run_dir), uses_adapter=True)
    messages = [{"role": "user", "content": QUESTION}]
    drawn = [model.chat(messages, max_tokens=8, temperature=1.0, seed=seed).text for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_loop_carries_the_conversation_and_starts_over_on_demand(run_dir):
    model = open_chat_model(open_run(run_dir))
    first = ask(model, "One?")
    second = ask(model, "One?", first, "Two?")
    alone = ask(model, "Two?")
    written = Recorder("One?", "Two?", "", "/new", "Two?").talk(model)
    assert written.splitlines()[1:] == f"{first}\n{second}\n{alone}".splitlines()
    assert second != alone, "negative control: the conversation matters"


def test_quit_ends_before_the_next_line(run_dir):
    recorder = Recorder("/quit", "never asked")
    recorder.talk(open_chat_model(open_run(run_dir)))
    assert recorder.lines == ["never asked"]


@pytest.mark.parametrize("uses_adapter", [False, True])
def test_too_long_a_conversation_says_so_and_goes_on(run_dir, uses_adapter):
    model = open_chat_model(open_run(run_dir), uses_adapter=uses_adapter)
    written = Recorder("ferry " * 300, "One?").talk(model)
    assert "; /new starts over\n" in written
    assert written.endswith(ask(model, "One?") + "\n")


def test_the_system_prompt_is_asked_with(run_dir):
    model = open_chat_model(open_run(run_dir))
    written = Recorder("One?").talk(model, system_prompt="Only numbers.")
    messages = [{"role": "system", "content": "Only numbers."}, {"role": "user", "content": "One?"}]
    assert written.endswith(model.chat(messages, max_tokens=6).text + "\n")


def run_script(*arguments: str | Path, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, REPOSITORY / "scripts/chat.py", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)


@pytest.mark.parametrize("arguments", [("--once", "à bientôt →"), ()], ids=["once", "lines"])
def test_a_terminal_that_is_not_utf_8_shows_what_it_can(tmp_path, arguments):
    """Make a model that generates one non-ASCII letter."""
    base_dir = write_biased_base(tmp_path / "base", lambda token: 9.0 if token in ("Ã", "©") else -30.0)
    run_dir = write_run(base_dir, tmp_path / "fährë", chat_template="chatml")
    export_run(run_dir, quantizations=["F32"], show=False)
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    finished = run_script(run_dir, *arguments, "--max-tokens", "6", input="à →\n", env=environment)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert "\\x" in finished.stdout or "\\u" in finished.stdout


@pytest.mark.parametrize(
    ("question", "said"), [("", "error: --once is empty"), (" \n", "error: --once is empty"), ("\udcff", "error: ll")]
)
def test_a_question_that_is_none_is_one_line(run_dir, question, said):
    finished = run_script(run_dir, "--once", question, "--max-tokens", "2")
    assert finished.returncode == 1
    [line] = finished.stderr.splitlines()
    assert line.startswith(said)


def test_the_script_answers_once(run_dir):
    finished = run_script(run_dir, "--once", QUESTION, "--max-tokens", "6")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == ask(open_chat_model(open_run(run_dir)), QUESTION) + "\n"


def test_a_run_without_export_is_told_the_command(tiny_untied_base, tmp_path):
    run_dir = write_run(tiny_untied_base, tmp_path / "new", chat_template="chatml")
    finished = run_script(run_dir, "--once", "Hi")
    assert finished.returncode == 1
    assert finished.stderr == (
        f"error: {run_dir}/export has no GGUF yet. First:\n  python scripts/export.py {run_dir}\n"
    )


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--max-tokens", "0", "--max-tokens must be at least 1, got 0"),
        ("--temperature", "-0.5", "--temperature must be at least 0 (greedy), got -0.5"),
        ("--threads", "0", "--threads must be at least 1, got 0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(run_dir, option, value, said):
    finished = run_script(run_dir, "--once", QUESTION, option, value)
    assert (finished.returncode, finished.stderr) == (1, f"error: {said}\n")
