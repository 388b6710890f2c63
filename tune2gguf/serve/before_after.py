"""Before and after a run: validation loss, and the replies of base and tuned model to validation questions.

llama.cpp runs both as GGUF files of the same type; the tuned one is the exported file.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from tune2gguf.base.gguf_weights import read_quantization
from tune2gguf.export.folder import find_served_files
from tune2gguf.export.pipeline import export_base
from tune2gguf.export.results import claim_folder, explain_write_errors
from tune2gguf.runs.run import Run, open_run
from tune2gguf.runs.validation_rows import read_validation_rows
from tune2gguf.serve.llama_cpp import open_model
from tune2gguf.tokenizer.conversation import Prompt, cut_before_reply, describe_reply, make_request_messages

MAX_REPLY_TOKENS = 100


@dataclass(frozen=True)
class Answer:
    """A validation question, its reference reply, and the replies of base and tuned model."""

    question: str
    reference: str
    before: str
    after: str


def read_validation_losses(run_dir: Path) -> tuple[float, float]:
    """Return the validation loss before training and the lowest one since, in nats per supervised token.

    Raises:
        ValueError: if the run was not validated after training
    """
    curves = Run(run_dir).curves
    if curves.base is None or curves.best is None:
        raise ValueError(f"{run_dir}: no validation loss before and after training; give the run validation rows")
    return curves.base.loss, curves.best.loss


def answer_before_and_after(run_dir: Path, *, gguf_path: Path | None = None, num_questions: int) -> list[Answer]:
    """Ask a run's base and its exported file the first validation questions, greedily.

    Args:
        gguf_path: None takes the newest one, or base and adapter for a run over a GGUF

    Raises:
        ValueError: if the run, its base, the file or a question is missing
    """
    if num_questions < 1:
        raise ValueError(f"--questions must be at least 1, got {num_questions}")
    run = open_run(run_dir)
    gguf_path, adapter_path = find_served_files(run) if gguf_path is None else (gguf_path, None)
    conversations = [conversation for conversation in read_validation_rows(run_dir) if conversation.messages]
    prompts = [cut_before_reply(conversation) for conversation in conversations[:num_questions]]
    if not prompts:
        raise ValueError(f"{run_dir}: has no validation conversation to ask")
    quantization = read_quantization(gguf_path)
    after = _ask(gguf_path, prompts, context_length=run.max_seq_len, adapter_path=adapter_path)
    if adapter_path is not None:
        before = _ask(gguf_path, prompts, context_length=run.max_seq_len)
        return _pair(prompts, before, after)
    # The next export deletes a killed process's leftovers of this name.
    leftover = {"dir": run.export_dir, "prefix": ".base.", "suffix": ".unfinished"}
    with (
        explain_write_errors(run.export_dir),
        claim_folder(run.export_dir),
        tempfile.TemporaryDirectory(**leftover) as folder,
    ):
        base_path = export_base(
            run.base_dir,
            Path(folder) / "base.gguf",
            quantization=quantization.name,
            chat_template=run.chat_template.name,
            takes_tools=any(prompt.tools for prompt in prompts),
        )
        before = _ask(base_path, prompts, context_length=run.max_seq_len)
    return _pair(prompts, before, after)


def _pair(prompts: list[Prompt], before: list[str], after: list[str]) -> list[Answer]:
    return [
        Answer(question=prompt.question, reference=prompt.reference, before=said_before, after=said_after)
        for prompt, said_before, said_after in zip(prompts, before, after, strict=True)
    ]


def _ask(gguf_path: Path, prompts: list[Prompt], *, context_length: int, adapter_path: Path | None = None) -> list[str]:
    model = open_model(gguf_path, context_length=context_length + MAX_REPLY_TOKENS, adapter_path=adapter_path)
    replies = [
        model.chat(make_request_messages(prompt.messages), tools=prompt.tools, max_tokens=MAX_REPLY_TOKENS)
        for prompt in prompts
    ]
    return [describe_reply(reply.text.strip(), reply.tool_calls) for reply in replies]
