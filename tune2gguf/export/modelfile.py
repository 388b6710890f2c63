"""The Modelfile: how Ollama serves the GGUF in the format that was trained."""

from __future__ import annotations

import re

from tune2gguf.tokenizer.templates import ChatTemplate

# What leaves the trained distribution as it is. Ollama's own defaults penalize repetition and cut the tail.
NEUTRAL_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}


def make_modelfile(
    gguf_name: str,
    *,
    chat_template: ChatTemplate,
    context_length: int,
    system_prompt: str | None = None,
    licence: str | None = None,
) -> str:
    """Return the Modelfile of a GGUF in the same folder (https://docs.ollama.com/modelfile).

    Args:
        context_length: tokens; max_seq_len of the run
        system_prompt: the one system prompt that all rows were trained with, or None

    Raises:
        ValueError: if the name, the system prompt or the licence cannot be written in a Modelfile
    """
    if re.search(r"[\r\n]", gguf_name):
        raise ValueError(f"the name {gguf_name!r} holds a line break, which a Modelfile cannot hold; rename the run")
    lines = [
        "# ollama create NAME -f THIS_FILE",
        f"FROM ./{gguf_name}",
        # The template that was trained; BOS is not in it, because the runtime adds it.
        f'TEMPLATE """{chat_template.ollama_template}"""',
    ]
    if system_prompt is not None:
        lines.append(f"SYSTEM {_quote(system_prompt, 'system prompt')}")
    lines += [f'PARAMETER stop "{stop}"' for stop in chat_template.stops]
    lines.append(f"PARAMETER num_ctx {context_length}")
    lines.append("# The distribution as trained; lower the temperature for more predictable answers.")
    lines += [f"PARAMETER {name} {value:g}" for name, value in NEUTRAL_SAMPLING.items()]
    if licence is not None:
        lines.append(f"LICENSE {_quote(licence, 'licence')}")
    return "\n".join(lines) + "\n"


def _quote(text: str, what: str) -> str:
    if '"""' in text or text.endswith('"'):
        raise ValueError(f'the {what} holds """ or ends with ", which a Modelfile cannot hold: {text[-80:]!r}')
    return f'"""{text}"""'
