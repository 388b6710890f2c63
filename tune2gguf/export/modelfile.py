"""The Modelfile: how Ollama serves the GGUF in the format that was trained."""

from __future__ import annotations

import json
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
        ValueError: if the licence or the file's name cannot be written in a Modelfile
    """
    if not gguf_name.isprintable():
        raise ValueError(f"{gguf_name!r}: Ollama cannot find a file of this name; rename the run's folder")
    # The template that was trained; BOS is not in it, because the runtime adds it.
    template, system = chat_template.ollama_template, None
    if system_prompt is not None:
        if _is_held(system_prompt) and not _find_dropped(system_prompt):
            system = system_prompt
        else:
            template = _put_into_template(system_prompt, chat_template)
    lines = ["# ollama create NAME -f THIS_FILE", f"FROM ./{gguf_name}", f'TEMPLATE """{template}"""']
    lines += [] if system is None else [f'SYSTEM """{system}"""']
    lines += [f'PARAMETER stop "{stop}"' for stop in chat_template.stops]
    lines.append(f"PARAMETER num_ctx {context_length}")
    lines.append("# The distribution as trained; lower the temperature for more predictable answers.")
    lines += [f"PARAMETER {name} {value:g}" for name, value in NEUTRAL_SAMPLING.items()]
    if licence is not None:
        if not _is_held(licence):
            raise ValueError('a line of the licence ends with """, which ends it in a Modelfile')
        lines.append(f'LICENSE """{licence}"""')
    return "\n".join(lines) + "\n"


def _is_held(text: str) -> bool:
    """Whether Ollama's parser reads all of a quoted text: it ends where a line ends with three quotes."""
    return re.search(r'"""\s*[\r\n]', text) is None


def _find_dropped(text: str) -> list[str]:
    """Return the characters that Ollama's parser leaves out: what does not print, joiners of emoji among them."""
    return [character for character in text if not (character.isprintable() or character in "\t\r\n")]


def _put_into_template(system_prompt: str, chat_template: ChatTemplate) -> str:
    """Return the template with a default system message that SYSTEM could not hold, as a constant of Go."""
    constant = json.dumps(system_prompt, ensure_ascii=False)
    for character in set(_find_dropped(constant)):
        constant = constant.replace(character, f"\\U{ord(character):08x}")
    template, constant = chat_template.ollama_template, f"{{{{ {constant} }}}}"
    if chat_template.system_prefix:
        return template.replace("{{ .System }}", "{{ if .System }}{{ .System }}{{ else }}" + constant + "{{ end }}")
    message = chat_template.role_start + "system" + chat_template.role_end + constant
    message += chat_template.end_of_turn + chat_template.turn_separator
    return "{{ if not .System }}" + message + "{{ end }}" + template
