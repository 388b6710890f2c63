"""The Modelfile, by which Ollama serves the GGUF in the trained format."""

from __future__ import annotations

import json
import math
import re

from tune2gguf.tokenizer.templates import ChatTemplate

# By benchmarks/sampling.py: only at 0 does a user get the replies that the proof checked.
DEFAULT_TEMPERATURE = 0.0
# These keep the trained distribution. Ollama's own defaults penalize repetition and cut the tail.
NEUTRAL_SAMPLING = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}


def make_modelfile(
    gguf_name: str,
    *,
    adapter_name: str | None = None,
    chat_template: ChatTemplate,
    context_length: int,
    temperature: float = DEFAULT_TEMPERATURE,
    system_prompt: str | None = None,
    licence: str | None = None,
) -> str:
    """Return the Modelfile of a GGUF in the same folder (https://docs.ollama.com/modelfile).

    Args:
        adapter_name: an adapter's GGUF in the same folder, applied to the base GGUF
        context_length: the run's max_seq_len, in tokens
        temperature: sampling temperature; 0 is greedy, 1 the trained distribution
        system_prompt: the system prompt that all training rows share, or None

    Raises:
        ValueError: if the temperature is negative or not finite, or a Modelfile cannot hold the licence or file name
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"--temperature must be finite and at least 0 (greedy), got {temperature:g}")
    if not gguf_name.isprintable():
        raise ValueError(f"{gguf_name!r}: Ollama cannot find a file of this name; rename the run's folder")
    # The trained template, without BOS: the runtime adds it.
    template, system = chat_template.ollama_template, None
    if system_prompt is not None:
        if _is_held(system_prompt) and not _find_dropped(system_prompt):
            system = system_prompt
        else:
            template = _put_into_template(system_prompt, chat_template)
    lines = ["# ollama create NAME -f THIS_FILE", f"FROM ./{gguf_name}"]
    lines += [] if adapter_name is None else [f"ADAPTER ./{adapter_name}"]
    lines.append(f'TEMPLATE """{template}"""')
    lines += [] if system is None else [f'SYSTEM """{system}"""']
    lines += [f'PARAMETER stop "{stop}"' for stop in chat_template.stops]
    lines.append(f"PARAMETER num_ctx {context_length}")
    lines.append("# 0: the likeliest answer, which the proof has checked; 1: drawn from the distribution as trained.")
    lines.append(f"PARAMETER temperature {temperature:g}")
    lines += [f"PARAMETER {name} {value:g}" for name, value in NEUTRAL_SAMPLING.items()]
    if licence is not None:
        if not _is_held(licence):
            raise ValueError(
                'a line of the licence ends with """, which ends it in a Modelfile; put text after the quotes'
            )
        lines.append(f'LICENSE """{licence}"""')
    return "\n".join(lines) + "\n"


def _is_held(text: str) -> bool:
    """Return whether Ollama's parser reads all of a quoted text: three quotes at a line's end would end it."""
    return re.search(r'"""\s*[\r\n]', text) is None


def _find_dropped(text: str) -> list[str]:
    """Return the characters that Ollama's parser drops: unprintable ones, which include emoji joiners."""
    return [character for character in text if not (character.isprintable() or character in "\t\r\n")]


def _put_into_template(system_prompt: str, chat_template: ChatTemplate) -> str:
    """Return the template with a default system message, as a Go constant, for text that SYSTEM cannot hold."""
    constant = json.dumps(system_prompt, ensure_ascii=False)
    for character in set(_find_dropped(constant)):
        constant = constant.replace(character, f"\\U{ord(character):08x}")
    template, constant = chat_template.ollama_template, f"{{{{ {constant} }}}}"
    chosen = "{{ if .System }}{{ .System }}{{ else }}" + constant + "{{ end }}"
    template = template.replace("{{ if .System }}{{ .System }}\n\n{{ end }}", chosen + "\n\n")
    if template == chat_template.ollama_template:
        template = template.replace("{{ .System }}", chosen)
    if chat_template.system_prefix:
        return template
    message = chat_template.role_start + "system" + chat_template.role_end + constant
    message += chat_template.end_of_turn + chat_template.turn_separator
    condition = "or .System .Tools" if chat_template.takes_tools else ".System"
    return f"{{{{ if not ({condition}) }}}}{message}{{{{ end }}}}{template}"
