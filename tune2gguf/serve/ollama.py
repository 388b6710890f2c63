"""Hand an exported model to Ollama and ask it once."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

from tune2gguf.commands import format_command
from tune2gguf.export.pipeline import Export
from tune2gguf.runs.run import Run
from tune2gguf.runs.validation_rows import read_validation_rows
from tune2gguf.tokenizer.conversation import cut_before_reply, trim


def serve_with_ollama(export: Export, name: str) -> str:
    """Make the model in Ollama and ask it a validation question; without Ollama, return the command that would.

    Raises:
        ValueError: if Ollama fails
    """
    modelfile_path = export.models[0].modelfile_path
    program = find_ollama()
    if program is None:
        return f"Ollama is not on PATH. Where it is: {format_create_command(name, modelfile_path)}"
    create_ollama_model(program, name, modelfile_path)
    question = find_question(export.run)
    if question is None:
        return f"made {name}; the run has no validation question to ask it"
    return f"made {name}\nQ {question}\nA {ask_ollama(program, name, question)}"


def check_ollama_name(name: str) -> None:
    """Raise ValueError for a name that Ollama would take for an option, or that is none."""
    if not name.strip() or name.startswith("-"):
        raise ValueError(f"{name!r} is no name of a model in Ollama; begin it with a letter or a digit")


def find_question(run: Run) -> str | None:
    """Return the first validation question that stands alone: `ollama run` takes one message.

    The run's one system prompt may stand before it: the Modelfile brings that.
    """
    for conversation in read_validation_rows(run.run_dir):
        if conversation.messages:
            prompt = cut_before_reply(conversation)[0]
            if prompt[0]["role"] == "system" and trim(prompt[0]["content"]) == run.system_prompt:
                del prompt[0]
            if len(prompt) == 1 and prompt[0]["role"] == "user":
                return prompt[0]["content"]
    return None


def find_ollama() -> str | None:
    """Return the path of the `ollama` program, or None."""
    return shutil.which("ollama")


def format_create_command(name: str, modelfile_path: Path) -> str:
    """Return the command line that makes the model, for whoever has Ollama elsewhere."""
    return format_command("ollama", "create", name, "-f", modelfile_path)


def create_ollama_model(program: str, name: str, modelfile_path: Path) -> None:
    """Run `ollama create`; its progress goes to the terminal.

    Raises:
        ValueError: if it fails
    """
    command = [program, "create", name, "-f", str(modelfile_path)]
    finished = subprocess.run(command, check=False)
    if finished.returncode != 0:
        raise ValueError(
            f"{shlex.join(command)} ended with exit code {finished.returncode}; is `ollama serve` running?"
        )


def ask_ollama(program: str, name: str, prompt: str, *, timeout_seconds: float = 600) -> str:
    """Ask a model once and return its reply.

    Raises:
        ValueError: if it fails or takes longer than the limit
    """
    try:
        # Through standard input: an argument may be too long, or look like an option.
        finished = subprocess.run(
            [program, "run", name],
            input=prompt.encode(),
            capture_output=True,
            check=False,
            timeout=timeout_seconds,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"ollama run {name} gave no reply within {timeout_seconds:g} seconds") from None
    if finished.returncode != 0:
        raise ValueError(f"ollama run {name} failed: {finished.stderr.decode(errors='replace').strip()}")
    return finished.stdout.decode(errors="replace").strip()
