"""Talk to a run: its exported GGUF through llama.cpp, or the adapter in torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tune2gguf.export.folder import find_adapter_files, find_served_files
from tune2gguf.machine.cpu import check_num_threads
from tune2gguf.model.generate import AdapterModel
from tune2gguf.runs.run import Run
from tune2gguf.serve.llama_cpp import LlamaCppModel, open_model

ChatModel = AdapterModel | LlamaCppModel
HELP = "/new starts over, /quit or Ctrl-D ends"


def open_chat_model(
    run: Run,
    *,
    gguf_path: Path | None = None,
    uses_adapter: bool = False,
    uses_adapter_gguf: bool = False,
    num_threads: int | None = None,
) -> ChatModel:
    """Load the model to talk to: the newest or the given GGUF, or base and adapter in torch or in llama.cpp.

    Raises:
        ValueError: if nothing was exported, or it cannot be loaded
    """
    if uses_adapter:
        from tune2gguf.serve.adapter_model import load_adapter_model

        return load_adapter_model(run)
    adapter_path = None
    if uses_adapter_gguf:
        gguf_path, adapter_path = find_adapter_files(run)
    elif gguf_path is None:
        gguf_path, adapter_path = find_served_files(run)
    return open_model(gguf_path, num_threads=num_threads, context_length=run.max_seq_len, adapter_path=adapter_path)


def check_options(*, max_tokens: int, temperature: float, num_threads: int | None) -> None:
    """Raise ValueError for a number out of range."""
    if max_tokens < 1:
        raise ValueError(f"--max-tokens must be at least 1, got {max_tokens}")
    if not temperature >= 0:
        raise ValueError(f"--temperature must be at least 0 (greedy), got {temperature:g}")
    check_num_threads(num_threads)


def start_conversation(system_prompt: str | None) -> list[dict[str, str]]:
    """Return the messages before the first question."""
    return [] if system_prompt is None else [{"role": "system", "content": system_prompt}]


def talk(
    model: ChatModel,
    *,
    system_prompt: str | None,
    max_tokens: int,
    temperature: float,
    read_line: Callable[[], str],
    write: Callable[[str], None],
) -> None:
    """Answer line by line until the input ends; on an error, print it and keep the conversation as it was.

    Args:
        read_line: returns the next line, raises EOFError at the end
        write: shows text as it comes
    """
    write(f"{HELP}\n")
    messages = start_conversation(system_prompt)
    while True:
        try:
            question = read_line().strip()
        except EOFError:
            return
        if question == "/quit":
            return
        if question == "/new":
            messages = start_conversation(system_prompt)
        elif question:
            conversation = [*messages, {"role": "user", "content": question}]
            try:
                reply = model.chat(conversation, max_tokens=max_tokens, temperature=temperature, on_text=write)
            except ValueError as error:
                write(f"{error}; /new starts over\n")
                continue
            write("\n")
            messages = [*conversation, {"role": "assistant", "content": reply.text}]
