"""A GGUF file in llama.cpp's server, in this process (package `xllamacpp`).

Only the server renders the file's own chat template and tokenizes with the file's own vocabulary, so its replies are
those that a user gets. It listens on a free loopback port, with a key that only this object knows.
"""

from __future__ import annotations

import json
import secrets
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tune2gguf.machine.cpu import count_cores
from tune2gguf.machine.spinning import share_cores
from tune2gguf.model.generate import Reply

BYTES_PER_THREAD = 200_000_000


@dataclass
class LlamaCppModel:
    """A loaded GGUF file; made by `open_model`."""

    server: Any
    api_key: str = field(repr=False)

    def chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] = (),
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        on_text: Callable[[str], None] | None = None,
    ) -> Reply:
        """Reply to a conversation of messages in OpenAI's format.

        Args:
            tools: definitions of the tools that may be called
            temperature: 0 is greedy
            on_text: called with each piece of the reply as it comes

        Raises:
            ValueError: if llama.cpp refuses the conversation
        """
        request = {
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
            # Neutral: the file's recommended sampling must not change the measured distribution.
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "repeat_penalty": 1.0,
        }
        if tools:
            request["tools"] = list(tools)
        try:
            if on_text is None:
                return _read_reply(_check(self.server.handle_chat_completions(request)))
            return self._stream(request, on_text)
        except RuntimeError as error:  # the request is unreadable: text that is not UTF-8
            raise ValueError(f"llama.cpp refused the conversation: {error}") from None

    def _stream(self, request: dict, on_text: Callable[[str], None]) -> Reply:
        pieces, last, usage, refused = [], {}, {}, []

        def receive(chunk: dict) -> None:
            for part in chunk if isinstance(chunk, list) else [chunk]:
                # An exception would be lost in llama.cpp's thread.
                if "error" in part:
                    refused.append(part)
                    return
                usage.update(part.get("usage") or {})
                for choice in part.get("choices", []):
                    text = choice["delta"].get("content")
                    if text:
                        pieces.append(text)
                        on_text(text)
                    last.update(choice)

        options = {"stream": True, "stream_options": {"include_usage": True}}
        self.server.handle_chat_completions(request | options, receive)
        for part in refused:
            _check(part)
        choice = {"message": {"content": "".join(pieces)}, "finish_reason": last.get("finish_reason")}
        return _read_reply({"choices": [choice], "usage": usage})

    def apply_template(self, messages: Sequence[dict[str, Any]], *, tools: Sequence[dict[str, Any]] = ()) -> str:
        """Return the prompt rendered from the messages by the file's chat template, up to the start of the reply."""
        request = {"messages": list(messages)} | ({"tools": list(tools)} if tools else {})
        return self.post("/apply-template", request)["prompt"]

    def tokenize(self, text: str, *, adds_bos: bool = False) -> list[int]:
        """Return the ids of a text; special tokens in it are parsed."""
        return self.post("/tokenize", {"content": text, "add_special": adds_bos, "parse_special": True})["tokens"]

    def score(self, tokens: Sequence[int], positions: Sequence[int]) -> list[float | None]:
        """Return the log-probability in nats of tokens[position], given the tokens before it, for each position.

        None for a token that ends in the middle of a character: the server reports no probability.
        """
        scores: list[float | None] = []
        for position in positions:
            token = int(tokens[position])
            request = {
                "prompt": [int(before) for before in tokens[:position]],
                "n_predict": 1,
                "n_probs": 1,
                "temperature": 0,
                # Makes the server report this token; its probabilities are those before the bias.
                "logit_bias": [[token, 1e4]],
            }
            found = self.post("/completion", request).get("completion_probabilities")
            scores.append(found[0]["logprob"] if found and found[0]["id"] == token else None)
        return scores

    def post(self, endpoint: str, content: dict) -> dict:
        """Send a request to an endpoint of llama.cpp's server and return its answer.

        Raises:
            ValueError: if it is refused
        """
        request = urllib.request.Request(
            self.server.listening_address + endpoint,
            data=json.dumps(content).encode(),
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {self.api_key}"},
        )
        # A proxy from the environment must not see loopback requests.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise ValueError(f"llama.cpp refused {endpoint}: {error.read().decode(errors='replace')}") from None


def choose_num_threads(path: Path) -> int:
    """Return one thread per 200 MB of weights, up to the cores: threads of a small model mostly wait."""
    return max(1, min(count_cores(), path.stat().st_size // BYTES_PER_THREAD))


def open_model(
    path: str | Path,
    *,
    num_threads: int | None = None,
    context_length: int = 2048,
    adapter_path: str | Path | None = None,
) -> LlamaCppModel:
    """Load a GGUF file.

    Args:
        num_threads: None chooses by the file's size; more threads than free cores slow it down: each waits for all
        context_length: tokens, prompt and reply together
        adapter_path: a LoRA adapter in GGUF to apply

    Raises:
        ValueError: if the file is missing or llama.cpp cannot load it
    """
    from xllamacpp import CommonAdapterLoraInfo, CommonParams, Server

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    api_key = secrets.token_hex(16)
    params = CommonParams()
    params.model.path = str(path)
    params.n_ctx = context_length
    params.cpuparams.n_threads = choose_num_threads(path) if num_threads is None else num_threads
    params.cpuparams_batch.n_threads = params.cpuparams.n_threads
    share_cores(params.cpuparams.n_threads)
    params.api_keys = [api_key]
    params.verbosity = -1  # errors reach the caller as exceptions
    params.warmup = False
    if adapter_path is not None:
        params.lora_adapters = [CommonAdapterLoraInfo(str(adapter_path), 1.0)]
    try:
        model = LlamaCppModel(Server(params), api_key)
    except RuntimeError as error:
        raise ValueError(f"{path}: llama.cpp cannot load it ({error})") from None
    # A server that is closed before its first request never ends (xllamacpp 2026.10).
    model.tokenize("")
    return model


def _check(response: dict) -> dict:
    if "error" in response:
        raise ValueError(f"llama.cpp refused the conversation: {response['error'].get('message', response['error'])}")
    return response


def _read_reply(response: dict) -> Reply:
    choice, usage = response["choices"][0], response.get("usage", {})
    calls = [call["function"] for call in choice["message"].get("tool_calls") or []]
    return Reply(
        text=choice["message"]["content"] or "",
        ended_by_itself=choice["finish_reason"] in ("stop", "tool_calls"),
        num_prompt_tokens=usage.get("prompt_tokens", 0),
        num_reply_tokens=usage.get("completion_tokens", 0),
        tool_calls=tuple({"name": call["name"], "arguments": json.loads(call["arguments"])} for call in calls),
    )
