"""Ollama's API: create an exported model, and ask it the proof's questions.

`ollama run` is not used: since 0.32 it wraps words with terminal escapes even into a pipe.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tune2gguf.export.folder import ExportedAdapter, ExportedModel
from tune2gguf.export.measure.validation_set import load_validation_rows
from tune2gguf.export.pipeline import DEFAULT_VALIDATION_ROWS, Export
from tune2gguf.runs.proof import ProofRecord
from tune2gguf.serve.serving import MAX_REPLY_TOKENS, find_askable
from tune2gguf.tokenizer.conversation import Message, cut_before_reply, describe_reply, make_request_messages
from tune2gguf.tokenizer.tools import sort_values

DEFAULT_PORTS = {"": 11434, "http": 80, "https": 443}
NUM_QUESTIONS = 3  # as the proof
_PART = r"[A-Za-z0-9_][\w.-]{0,79}"
# [HOST[:PORT]/][NAMESPACE/]MODEL[:TAG]
_NAME = re.compile(rf"(([A-Za-z0-9_][\w.:-]{{0,349}}/)?[A-Za-z0-9_][\w-]{{0,79}}/)?{_PART}(:{_PART})?", re.ASCII)


@dataclass(frozen=True)
class Ollama:
    """A running Ollama: its program, which uploads files, and the address of its server."""

    program: str
    address: str
    version: str

    def has_model(self, name: str) -> bool:
        """Return whether Ollama has a model of this name."""
        return _ask_server(self.address, "/api/show", {"model": name}, accepts_missing=True) is not None

    def create_model(self, name: str, model: ExportedModel | ExportedAdapter) -> None:
        """Run `ollama create`; its progress goes to the terminal.

        Raises:
            ValueError: if it fails
        """
        command = [self.program, "create", name, "-f", str(model.modelfile_path)]
        finished = subprocess.run(command, check=False)
        if finished.returncode != 0:
            raise ValueError(f"{shlex.join(command)} ended with exit code {finished.returncode}")

    def chat(self, name: str, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> str:
        """Return the greedy reply of a model, with its tool calls.

        Raises:
            ValueError: if the server refuses the conversation
        """
        request = {
            "model": name,
            "messages": make_request_messages(messages, arguments_as_text=False),
            "stream": False,
            "options": {"temperature": 0, "num_predict": MAX_REPLY_TOKENS},
        }
        if tools:
            request["tools"] = list(tools)
        message = _ask_server(self.address, "/api/chat", request)["message"]
        calls = [call["function"] for call in message.get("tool_calls") or []]
        return describe_reply(message["content"].strip(), sort_values(calls))


@dataclass(frozen=True)
class OllamaAnswer:
    """A validation question, Ollama's greedy reply, and llama.cpp's reply in the proof, if any."""

    question: str
    reply: str
    proven: str | None

    @property
    def is_proven(self) -> bool:
        return self.proven is not None and self.reply.strip() == self.proven.strip()


def check_ollama_name(name: str) -> None:
    """Raise ValueError unless Ollama accepts the name for a model."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is not an Ollama model name; give [NAMESPACE/]MODEL[:TAG], each of up to 80 letters, digits, "
            "'_', '-' and '.', beginning with a letter, a digit or '_'"
        )


def find_ollama() -> Ollama:
    """Return the Ollama that is installed and running.

    Raises:
        ValueError: if there is none
    """
    program = shutil.which("ollama")
    if program is None:
        raise ValueError(
            "Ollama is not on PATH. Leave --ollama out; copy the export folder to a machine with Ollama and run there: "
            "ollama create NAME -f Modelfile"
        )
    address = read_address(os.environ.get("OLLAMA_HOST", ""))
    version = _ask_server(address, "/api/version")["version"]
    return Ollama(program, address, version)


def read_address(host: str) -> str:
    """Return the server's address from OLLAMA_HOST, [SCHEME://]HOST[:PORT], as Ollama reads it."""
    scheme, separator, rest = host.strip().rpartition("://")
    scheme = scheme if separator else ""
    if scheme not in DEFAULT_PORTS:
        raise ValueError(f"OLLAMA_HOST={host}: must be [http://]HOST[:PORT]")
    try:
        parts = urlsplit(f"//{rest}")
        name, port = parts.hostname or "127.0.0.1", parts.port or DEFAULT_PORTS[scheme]
    except ValueError:
        raise ValueError(f"OLLAMA_HOST={host}: must be [http://]HOST[:PORT]") from None
    return f"{scheme or 'http'}://{f'[{name}]' if ':' in name else name}:{port}"


def ask_as_proven(ollama: Ollama, name: str, export: Export, proof: ProofRecord | None) -> list[OllamaAnswer]:
    """Ask the model the proof's questions; without a proof, the first validation questions."""
    validation = load_validation_rows(export.run, num_rows=DEFAULT_VALIDATION_ROWS)
    if validation is None:
        return []
    asked = find_askable(validation.conversations, validation.tokenizer, context_length=export.run.max_seq_len)
    proven = [] if proof is None else proof.served_by_llama_cpp[export.served.step]["replies"]
    answers = []
    for number, conversation in enumerate(asked[: len(proven) or NUM_QUESTIONS]):
        prompt = cut_before_reply(conversation)
        reply = ollama.chat(name, prompt.messages, prompt.tools)
        known = proven[number]["reply"] if number < len(proven) else None
        answers.append(OllamaAnswer(prompt.question, reply, known))
    return answers


def format_answers(name: str, version: str, answers: Sequence[OllamaAnswer]) -> str:
    """Return questions and answers for the terminal."""
    lines = [f"made {name} in Ollama {version}"]
    if not answers:
        lines[0] += "; the run has no validation question to ask it"
    elif all(answer.proven is not None for answer in answers):
        num_equal = sum(answer.is_proven for answer in answers)
        lines[0] += f"; {num_equal} of {len(answers)} answers equal the proof's"
    for answer in answers:
        lines += [f"Q {answer.question}", f"A {answer.reply.strip()}"]
        if answer.proven is not None and not answer.is_proven:
            lines.append(f"  the proof's: {answer.proven.strip()}")
    if any(answer.proven is not None and not answer.is_proven for answer in answers):
        lines.append("A quantized file's wording may differ between builds of llama.cpp; its meaning should not")
    return "\n".join(lines)


def _ask_server(address: str, path: str, content: Any = None, *, accepts_missing: bool = False) -> Any:
    """Send a request and return the JSON response; with accepts_missing, return None for a 404."""
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    # A proxy from the environment must not see requests to this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=600 if path == "/api/chat" else 10) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        if accepts_missing and error.code == 404:
            return None
        raise ValueError(f"Ollama refused {path}: {error.read().decode(errors='replace').strip()}") from None
    except (OSError, ValueError) as error:  # nothing listens there, or something else does
        reason = getattr(error, "reason", error)
        raise ValueError(f"no Ollama answers at {address} ({reason}). Start it: ollama serve") from None
