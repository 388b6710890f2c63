"""The Modelfile: how Ollama serves the GGUF in the format that was trained."""

from __future__ import annotations

import json
import math
import re

from tune2gguf.tokenizer.templates import ChatTemplate

# By benchmarks/sampling.py: what the proof found is what a user gets at 0 only.
DEFAULT_TEMPERATURE = 0.0
# What leaves the trained distribution as it is. Ollama's own defaults penalize repetition and cut the tail.
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
        adapter_name: an adapter's GGUF in the same folder, to be applied to it
        context_length: tokens; max_seq_len of the run
        temperature: of sampling, from the distribution as trained; 0 always takes the likeliest token
        system_prompt: the one system prompt that all rows were trained with, or None

    Raises:
        ValueError: if the temperature is none, or the licence or the file's name cannot be written in a Modelfile
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature {temperature:g} makes no sense; give 0, which is greedy, or more")
    if not gguf_name.isprintable():
        raise ValueError(f"{gguf_name!r}: Ollama cannot find a file of this name; rename the run's folder")
    # The template that was trained; BOS is not in it, because the runtime adds it.
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
