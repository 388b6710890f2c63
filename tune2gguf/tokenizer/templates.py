"""Chat templates: one record each, for the tokenizer, the GGUF and the Modelfile."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tune2gguf.tokenizer.tool_templates import make_chatml_go, make_chatml_jinja, make_llama_go, make_llama_jinja
from tune2gguf.tokenizer.tools import LLAMA_SYSTEM_PREFIX, WriteOut, write_out_chatml, write_out_llama


@dataclass(frozen=True)
class ChatTemplate:
    """The text format of a conversation. Contents are inserted unchanged.

    A message is `role_start + role + role_end + content + end_of_turn + turn_separator`. A final assistant message is
    the beginning of the reply (prefill): llama.cpp's server continues it, ollama_template leaves it open.
    """

    name: str
    beginning: str  # before the first message; the runtime adds it if it is the BOS token
    role_start: str
    role_end: str
    end_of_turn: str  # the last supervised token of a reply
    turn_separator: str  # after end_of_turn, never supervised
    jinja_template: str  # tokenizer.chat_template in the GGUF
    ollama_template: str  # TEMPLATE in the Modelfile; without BOS, which the runtime adds
    jinja_with_tools: str  # the same for conversations with tools as well
    ollama_with_tools: str
    write_out: WriteOut  # turns tools, calls and results into plain messages
    stops: tuple[str, ...]  # stop tokens, if the vocabulary has them
    system_prefix: str = ""  # before the system message's content; with one, every conversation has a system message

    def with_tools(self) -> ChatTemplate:
        """Return the record with the templates that take tools."""
        return replace(self, jinja_template=self.jinja_with_tools, ollama_template=self.ollama_with_tools)

    @property
    def takes_tools(self) -> bool:
        return self.jinja_template == self.jinja_with_tools


# The loop over the messages in Ollama's templates: $i is the index, $isOpen is true for a final prefill.
_RANGE = (
    "{{- $isOpen := false }}"
    '{{- range $i, $_ := .Messages }}{{ $isOpen = and (eq .Role "assistant") (eq (len (slice $.Messages $i)) 1) }}'
)


_CLOSE = ("{{ if not $isOpen }}", "{{ end }}")


def _close_turn(end: str) -> str:
    return end.join(_CLOSE)


# Llama 3.0's published jinja template without its trim, which is the format that torchtune trains on.
LLAMA3 = ChatTemplate(
    name="llama3",
    beginning="<|begin_of_text|>",
    role_start="<|start_header_id|>",
    role_end="<|end_header_id|>\n\n",
    end_of_turn="<|eot_id|>",
    turn_separator="",
    jinja_template=(
        "{% set loop_messages = messages %}{% for message in loop_messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
        "+ message['content'] + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    ollama_template=(
        _RANGE
        + "<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}"
        + _close_turn("<|eot_id|>")
        + "{{ end }}"
        + _close_turn("<|start_header_id|>assistant<|end_header_id|>\n\n")
    ),
    jinja_with_tools=make_llama_jinja(""),
    ollama_with_tools=make_llama_go("", _RANGE, _CLOSE),
    write_out=write_out_llama,
    # Llama 3.1 and 3.2 may end a call with <|eom_id|>, which says that they wait for its result.
    stops=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
)

# Meta's templates for Llama 3.1 and 3.2 without tools. Some runtimes put the date of the request into them. Here it is
# the fixed date that they fall back to: else the served prompt would differ from the trained one.
LLAMA3_1 = replace(
    LLAMA3,
    name="llama3_1",
    system_prefix=LLAMA_SYSTEM_PREFIX,
    jinja_template=(
        "{% if messages[0]['role'] == 'system' %}"
        "{% set system_content = messages[0]['content'] %}{% set loop_messages = messages[1:] %}"
        "{% else %}{% set system_content = '' %}{% set loop_messages = messages %}{% endif %}"
        "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\n"
        + LLAMA_SYSTEM_PREFIX
        + "' + system_content + '<|eot_id|>' }}{% for message in loop_messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
        " + message['content'] + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    ollama_template=(
        "<|start_header_id|>system<|end_header_id|>\n\n"
        + LLAMA_SYSTEM_PREFIX
        + "{{ .System }}<|eot_id|>"
        + _RANGE
        + '{{ if ne .Role "system" }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}'
        + _close_turn("<|eot_id|>")
        + "{{ end }}{{ end }}"
        + _close_turn("<|start_header_id|>assistant<|end_header_id|>\n\n")
    ),
    jinja_with_tools=make_llama_jinja(LLAMA_SYSTEM_PREFIX),
    ollama_with_tools=make_llama_go(LLAMA_SYSTEM_PREFIX, _RANGE, _CLOSE),
)

# No default system message: the served prompt holds only what the training rows hold.
CHATML = ChatTemplate(
    name="chatml",
    beginning="",
    role_start="<|im_start|>",
    role_end="\n",
    end_of_turn="<|im_end|>",
    turn_separator="\n",
    jinja_template=(
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    ollama_template=(
        _RANGE
        + "<|im_start|>{{ .Role }}\n{{ .Content }}"
        + _close_turn("<|im_end|>\n")
        + "{{ end }}"
        + _close_turn("<|im_start|>assistant\n")
    ),
    jinja_with_tools=make_chatml_jinja(),
    ollama_with_tools=make_chatml_go(_RANGE, _CLOSE),
    write_out=write_out_chatml,
    stops=("<|im_start|>", "<|im_end|>"),
)

CHAT_TEMPLATES = {chat_template.name: chat_template for chat_template in (LLAMA3, LLAMA3_1, CHATML)}
