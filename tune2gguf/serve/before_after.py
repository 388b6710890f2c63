"""What a run changed, at a glance: the validation loss, and validation questions answered by base and tuned model.

Both are asked through llama.cpp, as GGUF files of the same type: the tuned one is the very file that was exported.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from tune2gguf.export.pipeline import export_base
from tune2gguf.runs.run import Run, open_run
from tune2gguf.runs.validation_rows import read_validation_rows
from tune2gguf.serve.llama_cpp import open_model
from tune2gguf.tokenizer.conversation import cut_before_reply


@dataclass(frozen=True)
class Answer:
    """One validation question, its reference, and what the two models say."""

    question: str
    reference: str
    before: str
    after: str


def read_validation_losses(run_dir: Path) -> tuple[float, float]:
    """Return the validation loss before training and the lowest one after a step, in nats per supervised token.

    Raises:
        ValueError: if the run was not validated after training
    """
    curves = Run(run_dir).curves
    if curves.base is None or curves.best is None:
        raise ValueError(f"{run_dir}: no validation loss before and after training; give the run validation rows")
    return curves.base.loss, curves.best.loss


def answer_before_and_after(run_dir: Path, gguf_path: str | Path, *, num_questions: int) -> list[Answer]:
    """Ask the first validation questions of a run to its base and to its exported file, greedily.

    Raises:
        ValueError: if the run, its base or the file is missing
    """
    conversations = [conversation for conversation in read_validation_rows(run_dir) if conversation.messages]
    prompts = [cut_before_reply(conversation) for conversation in conversations[:num_questions]]
    after = _ask(Path(gguf_path), prompts)
    run = open_run(run_dir)
    with tempfile.TemporaryDirectory(dir=run.export_dir) as folder:
        base_path = export_base(
            run.base_dir,
            Path(folder) / "base.gguf",
            quantization=run.quantization,
            chat_template=run.chat_template.name,
        )
        before = _ask(base_path, prompts)
    return [
        Answer(question=prompt[-1]["content"], reference=reference, before=said_before, after=said_after)
        for (prompt, reference), said_before, said_after in zip(prompts, before, after, strict=True)
    ]


def _ask(gguf_path: Path, prompts: list[tuple[list[dict[str, str]], str]]) -> list[str]:
    model = open_model(gguf_path)
    return [model.chat(prompt, max_tokens=100).text.strip() for prompt, _ in prompts]
