"""The Python API for notebooks and programs: `from tune2gguf import run_recipe, export_run, ask`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tune2gguf.commands import find_config, format_overrides
from tune2gguf.config import read_config
from tune2gguf.export.pipeline import export_run
from tune2gguf.runs.run import open_run
from tune2gguf.serve.chat import open_chat_model, start_conversation

__all__ = ["ask", "export_run", "run_recipe"]


def run_recipe(config: str | Path, overrides: Mapping[str, Any] | None = None, *, launcher: Sequence[str] = ()) -> Path:
    """Run the recipe in its own processes, with its output, and return the run's folder.

    Args:
        config: a YAML, or the name of one that comes with the package
        overrides: values by key, such as {"dataset.files": ["my.jsonl"], "epochs": 2}
        launcher: options of torchrun, such as ["--nproc_per_node", "2"]

    Raises:
        ValueError: if the config cannot be read with the overrides
        subprocess.CalledProcessError: if the run fails; its output says why
    """
    words = format_overrides(overrides or {})
    run_dir = Path(read_config(find_config(str(config)), words).output_dir)
    command = [sys.executable, "-m", "tune2gguf", "run", *launcher, "--config", str(config), *words]
    subprocess.run(command, check=True)
    return run_dir


def ask(run_dir: str | Path, question: str, *, max_tokens: int = 256) -> str:
    """Return the reply of a run's newest GGUF in llama.cpp, with greedy decoding.

    Raises:
        ValueError: if nothing has been exported yet
    """
    run = open_run(Path(run_dir))
    messages = [*start_conversation(run.system_prompt), {"role": "user", "content": question}]
    return open_chat_model(run).chat(messages, max_tokens=max_tokens, temperature=0.0).text
