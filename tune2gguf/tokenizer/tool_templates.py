"""Chat templates with tools, for jinja (the GGUF) and for Go (Ollama). They write the same text as tools.py.

Three engines must write the same JSON. jinja's `tojson` is Python's. Go's `json` escapes <, > and & and omits spaces,
so strings are written by `printf "%q"`, and objects and arrays by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tune2gguf.tokenizer.tools import (
    CHATML_CALL_INSTRUCTION,
    CHATML_INSTRUCTION,
    LLAMA_ENVIRONMENT,
    LLAMA_INSTRUCTION,
    LLAMA_SYSTEM_PREFIX,
)


@dataclass(frozen=True)
class _Layout:
    """The line breaks of JSON: with an indent, or none."""

    indent: int | None

    def begin(self, depth: int) -> str:
        """Return the text after an opening bracket whose members have this depth."""
        return "" if self.indent is None else "\n" + " " * self.indent * depth

    def separate(self, depth: int) -> str:
        return ", " if self.indent is None else "," + self.begin(depth)


def _quote(text: str) -> str:
    """Return a text as a double-quoted literal of jinja or Go."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def _say(text: str) -> str:
    """Return a jinja action that writes a text, independent of the engine's white space settings."""
    return "{{- " + _quote(text) + " }}"


def write_jinja_tool(layout: _Layout) -> str:
    """Return a jinja macro `write_tool(function)`."""
    begin, separate = layout.begin, layout.separate

    def write_list(depth: int, values: str) -> str:
        between = "{%- if not loop.last %}" + _say(separate(depth)) + "{%- endif %}"
        items = "{%- for one in " + values + " %}{{- one | tojson }}" + between + "{%- endfor %}"
        return _say("[" + begin(depth)) + items + _say(begin(depth - 1) + "]")

    def write_key(key: str, value: str, condition: str) -> str:
        written = "{{- separator }}" + _say(f'"{key}": ') + value
        return f"{{%- if {condition} %}}" + written + "{%- set separator = " + _quote(separate(5)) + " %}{%- endif %}"

    kind = "{%- if schema.type is string %}{{- schema.type | tojson }}{%- else %}"
    kind += write_list(6, "schema.type") + "{%- endif %}"
    items = _say("{" + begin(6) + '"type": ') + "{{- schema['items'].type | tojson }}" + _say(begin(5) + "}")
    has_items = "schema['items'] is defined and schema['items'] is mapping and schema['items'].type is string"
    keys = write_key("type", kind, "schema.type")
    keys += write_key("description", "{{- schema.description | tojson }}", "schema.description")
    keys += write_key("enum", write_list(6, "schema.enum"), "schema.enum") + write_key("items", items, has_items)
    properties = (
        "{%- for key, schema in properties | dictsort(true) %}"
        "{{- key | tojson }}" + _say(": {") + "{%- set separator = " + _quote(begin(5)) + " %}" + keys
        # An object without a key has no line breaks.
        + "{%- if separator == " + _quote(separate(5)) + " %}" + _say(begin(4)) + "{%- endif %}" + _say("}")
        + "{%- if not loop.last %}" + _say(separate(4)) + "{%- endif %}{%- endfor %}"
    )  # fmt: skip
    required = _say(separate(3) + '"required": ') + write_list(4, "function.parameters.required")
    return (
        "{%- macro write_tool(function) %}"
        + _say("{" + begin(1) + '"type": "function"' + separate(1) + '"function": {' + begin(2) + '"name": ')
        + "{{- function.name | tojson }}"
        + "{%- if function.description %}" + _say(separate(2) + '"description": ')
        + "{{- function.description | tojson }}{%- endif %}"
        + _say(separate(2) + '"parameters": {' + begin(3) + '"type": "object"' + separate(3) + '"properties": ')
        + "{%- set properties = function.parameters.properties if function.parameters else none %}"
        + "{%- if properties %}" + _say("{" + begin(4)) + properties + _say(begin(3) + "}")
        + "{%- else %}" + _say("{}") + "{%- endif %}"
        + "{%- if function.parameters and function.parameters.required %}" + required + "{%- endif %}"
        + _say(begin(2) + "}" + begin(1) + "}" + begin(0) + "}")
        + "{%- endmacro %}"
    )  # fmt: skip


def _write_jinja_arguments(condition: str) -> str:
    return (
        "{%- for key, value in call.arguments | dictsort(true) %}{%- if " + condition + " %}"
        "{{- state.separator }}{{- key | tojson }}" + _say(": ") + "{{- value | tojson }}"
        '{%- set state.separator = ", " %}{%- endif %}{%- endfor %}'
    )  # fmt: skip


# In the order of tools.order_arguments. OpenAI's clients send JSON text; engines pass on an object or the text.
_JINJA_ARGUMENTS = (
    "{%- macro write_arguments(call, tools) %}{%- if call.arguments is string %}{{- call.arguments }}{%- else %}"
    '{%- set state = namespace(separator="", required=[]) %}'
    "{%- if tools %}{%- for tool in tools %}"
    "{%- if tool.function.name == call.name and tool.function.parameters and tool.function.parameters.required %}"
    "{%- set state.required = tool.function.parameters.required %}{%- endif %}{%- endfor %}{%- endif %}"
    + _say("{")
    + _write_jinja_arguments("key in state.required")
    + _write_jinja_arguments("key not in state.required")
    + _say("}")
    + "{%- endif %}{%- endmacro %}"
)


def make_llama_jinja(prefix: str) -> str:
    """Return Meta's format as tools.write_out_llama writes it.

    Args:
        prefix: of the system message if there are no tools
    """
    header, end = "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"
    prefixed = _say(header.format("system")) + "{%- if tools %}" + _say(LLAMA_ENVIRONMENT + LLAMA_SYSTEM_PREFIX)
    prefixed += "{%- else %}" + _say(prefix) + "{%- endif %}"
    has_block = "true" if prefix else "tools or messages[0].role == 'system'"
    return (
        write_jinja_tool(_Layout(4))
        + _JINJA_ARGUMENTS
        + "{{- bos_token }}"
        + "{%- if " + has_block + " %}" + prefixed
        + "{%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- endif %}" + _say(end) + "{%- endif %}"
        + "{%- set state = namespace(shows_tools=true if tools else false) %}"
        + "{%- for message in messages %}"
        + "{%- if message.role == 'system' and loop.first %}"
        + "{%- elif message.role == 'tool' or message.role == 'ipython' %}"
        + _say(header.format("ipython")) + "{{- message.content }}" + _say(end)
        + "{%- elif message.tool_calls %}"
        + "{%- set call = message.tool_calls[0].function %}"
        + _say(header.format("assistant") + '{"name": ') + "{{- call.name | tojson }}" + _say(', "parameters": ')
        + "{{- write_arguments(call, tools) }}" + _say("}" + end)
        + "{%- else %}"
        + '{{- "<|start_header_id|>" + message.role + "<|end_header_id|>\\n\\n" }}'
        + "{%- if state.shows_tools and message.role == 'user' %}"
        + "{%- set state.shows_tools = false %}" + _say(LLAMA_INSTRUCTION)
        + "{%- for tool in tools %}{{- write_tool(tool.function) }}" + _say("\n\n") + "{%- endfor %}{%- endif %}"
        + "{{- message.content }}" + _say(end)
        + "{%- endif %}{%- endfor %}"
        + "{%- if add_generation_prompt %}" + _say(header.format("assistant")) + "{%- endif %}"
    )  # fmt: skip


def make_chatml_jinja() -> str:
    """Return ChatML's format as tools.write_out_chatml writes it."""
    end = "<|im_end|>\n"
    calls = (
        "{%- for tool_call in message.tool_calls %}"
        "{%- if message.content or not loop.first %}" + _say("\n") + "{%- endif %}"
        + _say('<tool_call>\n{"name": ') + "{{- tool_call.function.name | tojson }}" + _say(', "arguments": ')
        + "{{- write_arguments(tool_call.function, tools) }}" + _say("}\n</tool_call>") + "{%- endfor %}"
    )  # fmt: skip
    return (
        write_jinja_tool(_Layout(None))
        + _JINJA_ARGUMENTS
        + "{%- if tools %}" + _say("<|im_start|>system\n")
        + "{%- if messages[0].role == 'system' and messages[0].content %}{{- messages[0].content }}" + _say("\n\n")
        + "{%- endif %}" + _say(CHATML_INSTRUCTION)
        + "{%- for tool in tools %}" + _say("\n") + "{{- write_tool(tool.function) }}{%- endfor %}"
        + _say(CHATML_CALL_INSTRUCTION + end) + "{%- endif %}"
        + "{%- for message in messages %}"
        + "{%- if message.role == 'tool' %}"
        + "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}" + _say("<|im_start|>user\n")
        + "{%- else %}" + _say("\n") + "{%- endif %}"
        + _say("<tool_response>\n") + "{{- message.content }}" + _say("\n</tool_response>")
        + "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}" + _say(end) + "{%- endif %}"
        + "{%- elif not (tools and message.role == 'system' and loop.first) %}"
        + '{{- "<|im_start|>" + message.role + "\\n" }}'
        + "{%- if message.content %}{{- message.content }}{%- endif %}"
        + "{%- if message.tool_calls %}" + calls + "{%- endif %}" + _say(end)
        + "{%- endif %}{%- endfor %}"
        + "{%- if add_generation_prompt %}" + _say("<|im_start|>assistant\n") + "{%- endif %}"
    )  # fmt: skip


# Any JSON value, as Python writes it. Go's range visits an object's keys in sorted order.
_GO_VALUE = (
    '{{- define "value" }}{{ $kind := printf "%T" . }}'
    '{{ if eq $kind "string" }}{{ printf "%q" . }}'
    '{{ else if eq $kind "map[string]interface {}" }}{{ "{" }}'
    '{{ $separator := "" }}{{ range $key, $value := . }}{{ $separator }}{{ printf "%q" $key }}: '
    '{{ template "value" $value }}{{ $separator = ", " }}{{ end }}}'
    '{{ else if eq $kind "[]interface {}" }}['
    '{{ range $i, $value := . }}{{ if $i }}, {{ end }}{{ template "value" $value }}{{ end }}]'
    "{{ else }}{{ json . }}{{ end }}{{ end -}}"
)


def _write_go_arguments(condition: str) -> str:
    return (
        "{{ range $key, $value := .Function.Arguments }}{{ $isRequired := false }}"
        "{{ range $.Tools }}{{ if eq .Function.Name $name }}{{ range .Function.Parameters.Required }}"
        "{{ if eq . $key }}{{ $isRequired = true }}{{ end }}{{ end }}{{ end }}{{ end }}"
        "{{ if " + condition + " }}{{ $separator }}"
        '{{ printf "%q" $key }}: {{ template "value" $value }}{{ $separator = ", " }}{{ end }}{{ end }}'
    )


_GO_ARGUMENTS = (
    '{{ $name := .Function.Name }}{{ $separator := "" }}{{ "{" }}'
    + _write_go_arguments("$isRequired")
    + _write_go_arguments("not $isRequired")
    + '{{ "}" }}'
)


def write_go_tool(layout: _Layout) -> str:
    """Return Go actions that write the tool `.`."""
    begin, separate = layout.begin, layout.separate

    def write_list(depth: int, values: str) -> str:
        one = '{{ template "value" $one }}'
        items = f"{{{{ range $i, $one := {values} }}}}{{{{ if $i }}}}{separate(depth)}{{{{ end }}}}{one}{{{{ end }}}}"
        return f"[{begin(depth)}{items}{begin(depth - 1)}]"

    def write_key(key: str, value: str, condition: str) -> str:
        written = f'{{{{ $separator }}}}"{key}": {value}{{{{ $separator = {_quote(separate(5))} }}}}'
        return f"{{{{ if {condition} }}}}{written}{{{{ end }}}}"

    kind = '{{ if eq (len .Type) 1 }}{{ printf "%q" (index .Type 0) }}{{ else }}'
    kind += write_list(6, ".Type") + "{{ end }}"
    keys = write_key("type", kind, ".Type")
    keys += write_key("description", '{{ printf "%q" .Description }}', ".Description")
    keys += write_key("enum", write_list(6, ".Enum"), ".Enum")
    items = f'{{{{ "{{" }}}}{begin(6)}"type": {{{{ printf "%q" $type }}}}{begin(5)}}}'
    keys += (
        '{{ if eq (printf "%T" .Items) "map[string]interface {}" }}{{ $type := index .Items "type" }}'
        + write_key("items", items, 'eq (printf "%T" $type) "string"')
        + "{{ end }}"
    )
    properties = (
        '{{ $between := "" }}{{ range $key, $schema := .Function.Parameters.Properties }}{{ $between }}'
        '{{ printf "%q" $key }}: {{ "{" }}{{ $separator := ' + _quote(begin(5)) + " }}" + keys
        + "{{ if eq $separator " + _quote(separate(5)) + " }}" + begin(4) + "{{ end }}}"
        + "{{ $between = " + _quote(separate(4)) + " }}{{ end }}"
    )  # fmt: skip
    return (
        '{{ "{" }}' + begin(1) + '"type": "function"' + separate(1) + '"function": {' + begin(2)
        + '"name": {{ printf "%q" .Function.Name }}'
        + "{{ if .Function.Description }}" + separate(2)
        + '"description": {{ printf "%q" .Function.Description }}{{ end }}'
        + separate(2) + '"parameters": {' + begin(3) + '"type": "object"' + separate(3) + '"properties": '
        + '{{ if .Function.Parameters.Properties }}{{ "{" }}' + begin(4) + properties + begin(3) + "}"
        + '{{ else }}{{ "{}" }}{{ end }}'
        + "{{ if .Function.Parameters.Required }}" + separate(3) + '"required": '
        + write_list(4, ".Function.Parameters.Required") + "{{ end }}"
        + begin(2) + "}" + begin(1) + "}" + begin(0) + "}"
    )  # fmt: skip


def make_llama_go(prefix: str, go_over: str, close_turn: Sequence[str]) -> str:
    """Return make_llama_jinja's format for Ollama.

    Args:
        go_over: the beginning of the loop over the messages
        close_turn: texts before and after a part that is omitted if the last message is a prefill
    """
    header, end = "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>".join(close_turn)
    block = header.format("system") + "{{ if .Tools }}" + LLAMA_ENVIRONMENT + LLAMA_SYSTEM_PREFIX
    block += "{{ else }}" + prefix + "{{ end }}{{ .System }}<|eot_id|>"
    if not prefix:
        block = "{{ if .Tools }}" + block.replace("{{ else }}{{ end }}", "{{ end }}") + "{{ end }}"
    is_shown = 'ne .Role "system"' if prefix else 'or (ne .Role "system") (not $.Tools)'
    return (
        _GO_VALUE + block + "{{- $showsTools := .Tools }}" + go_over
        + "{{ if " + is_shown + " }}"
        + '{{ if eq .Role "tool" }}' + header.format("ipython") + "{{ .Content }}<|eot_id|>"
        + "{{ else }}" + header.format("{{ .Role }}")
        # Ollama takes the first text after `if .ToolCalls` as the beginning of a call.
        + '{{ if .ToolCalls }}{{ with index .ToolCalls 0 }}{"name": {{ printf "%q" .Function.Name }}, "parameters": '
        + _GO_ARGUMENTS + '{{ "}" }}<|eot_id|>{{ end }}{{ else }}'
        + '{{ if and $showsTools (eq .Role "user") }}{{ $showsTools = false }}' + LLAMA_INSTRUCTION
        + "{{ range $.Tools }}" + write_go_tool(_Layout(4)) + "\n\n{{ end }}{{ end }}"
        + "{{ .Content }}" + end
        + "{{ end }}{{ end }}{{ end }}{{ end }}" + header.format("assistant").join(close_turn)
    )  # fmt: skip


def make_chatml_go(go_over: str, close_turn: Sequence[str]) -> str:
    """Return make_chatml_jinja's format for Ollama; arguments as in make_llama_go."""
    return (
        _GO_VALUE
        + "{{ if .Tools }}<|im_start|>system\n{{ if .System }}{{ .System }}\n\n{{ end }}" + CHATML_INSTRUCTION
        + "{{ range .Tools }}\n" + write_go_tool(_Layout(None)) + "{{ end }}" + CHATML_CALL_INSTRUCTION
        + "<|im_end|>\n{{ end }}"
        + "{{- $wasResult := false }}" + go_over
        + '{{ if eq .Role "tool" }}{{ if $wasResult }}\n{{ else }}<|im_start|>user\n{{ end }}{{ $wasResult = true }}'
        + "<tool_response>\n{{ .Content }}\n</tool_response>"
        + '{{ $rest := slice $.Messages $i }}{{ $next := "" }}'
        + "{{ if gt (len $rest) 1 }}{{ $next = (index $rest 1).Role }}{{ end }}"
        + '{{ if ne $next "tool" }}<|im_end|>\n{{ $wasResult = false }}{{ end }}'
        + '{{ else if or (ne .Role "system") (not $.Tools) }}<|im_start|>{{ .Role }}\n{{ .Content }}'
        + "{{ $calls := .ToolCalls }}{{ if and .Content $calls }}\n{{ end }}"
        # Ollama takes the first text after `if .ToolCalls` as the beginning of a call.
        + "{{ if .ToolCalls }}{{ range $j, $call := .ToolCalls }}"
        + '<tool_call>\n{"name": {{ printf "%q" .Function.Name }}, "arguments": ' + _GO_ARGUMENTS
        + '{{ "}" }}\n</tool_call>{{ if gt (len (slice $calls $j)) 1 }}\n{{ end }}{{ end }}{{ end }}'
        + "<|im_end|>\n".join(close_turn)
        + "{{ end }}{{ end }}" + "<|im_start|>assistant\n".join(close_turn)
    )  # fmt: skip
