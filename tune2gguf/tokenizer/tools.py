"""Tools as plain messages: writes definitions, calls and results into the text of a conversation.

Two formats: Meta's for Llama 3.1 and 3.2 (a call is a JSON object, one per turn; definitions are in the first user
message), and that of ChatML models (calls between <tool_call> tags, several per turn; definitions are in the system
message).

Only the keys of a definition that reach Ollama's templates are written, in the templates' order, properties by name.
A tool thus has the same ids in every engine, however a client orders its keys. tool_templates.py has the same formats
for the engines.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from tune2gguf.tokenizer.conversation import Message

# The date is the one of Meta's templates if the runtime gives none.
LLAMA_SYSTEM_PREFIX = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
LLAMA_ENVIRONMENT = "Environment: ipython\n"
LLAMA_INSTRUCTION = (
    "Given the following functions, please respond with a JSON for a function call "
    "with its proper arguments that best answers the given prompt.\n\n"
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)
CHATML_INSTRUCTION = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
CHATML_CALL_INSTRUCTION = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)
# Keys of a definition that are written; of `items`, only its type.
FUNCTION_KEYS = ("name", "description", "parameters")
PARAMETERS_KEYS = ("type", "properties", "required")
PROPERTY_KEYS = ("type", "description", "enum", "items")


def canonicalize_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return a definition ({"type": "function", "function": {…}}) with its written keys in the written order."""
    function = tool["function"]
    parameters = function.get("parameters") or {}
    properties = parameters.get("properties") or {}
    written = {"type": "object", "properties": {key: _write_property(properties[key]) for key in sorted(properties)}}
    if parameters.get("required"):
        written["required"] = list(parameters["required"])
    described = {"description": function["description"]} if function.get("description") else {}
    return {"type": "function", "function": {"name": function["name"], **described, "parameters": written}}


def _write_property(schema: Any) -> dict[str, Any]:
    found = {key: schema[key] for key in PROPERTY_KEYS[:3] if schema.get(key)}
    if isinstance(schema.get("items"), Mapping) and isinstance(schema["items"].get("type"), str):
        found["items"] = {"type": schema["items"]["type"]}
    return found


def list_unwritten_keys(tool: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys of a definition that are neither null nor written."""
    function = tool["function"]
    parameters = function.get("parameters") or {}
    yield from _list_others(tool, ("type", "function"), "tools[]")
    yield from _list_others(function, FUNCTION_KEYS, "tools[].function")
    yield from _list_others(parameters, PARAMETERS_KEYS, "parameters")
    for schema in (parameters.get("properties") or {}).values():
        yield from _list_others(schema, PROPERTY_KEYS, "properties")
        yield from _list_others(schema.get("items") or {}, ("type",), "properties.items")


def _list_others(values: Any, known: Sequence[str], place: str) -> Iterator[str]:
    if isinstance(values, Mapping):
        yield from (f"{place}.{key}" for key, value in values.items() if key not in known and value is not None)


def sort_values(value: Any) -> Any:
    """Return a JSON value as Go writes it: objects with sorted keys, whole numbers as integers."""
    if isinstance(value, Mapping):
        return {key: sort_values(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [sort_values(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def order_arguments(call: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a call's arguments in the written order: the required ones first, each group sorted by name.

    llama.cpp's grammar demands the required ones first; Go can only sort by name.
    """
    required = next(
        ((tool["function"].get("parameters") or {}).get("required") or []
         for tool in tools if tool["function"]["name"] == call["name"]),
        [],
    )  # fmt: skip
    arguments = sort_values(call["arguments"])
    return {key: arguments[key] for key in sorted(arguments, key=lambda key: (key not in required, key))}


def write_json(value: Any, *, indent: int | None = None) -> str:
    """Return JSON as the engines' `tojson` writes it."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def is_written_alike(text: str) -> bool:
    """Return whether Go's %q, used in Ollama's template, writes a text as JSON: it escapes unprintable characters."""
    return all(character.isprintable() or character in "\t\r\n" for character in text)


def write_out_llama(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], prefix: str) -> list[Message]:
    """Return the plain messages of Meta's format; results have the role ipython.

    Args:
        prefix: of the system message if there are no tools; with one, every conversation has a system message

    Raises:
        ValueError: for several calls in a turn, or text beside a call
    """
    if tools:
        prefix = LLAMA_ENVIRONMENT + LLAMA_SYSTEM_PREFIX
    messages = list(messages)
    if prefix:
        has_system = bool(messages) and messages[0].role == "system"
        content = messages[0].content if has_system else ""
        messages[:has_system] = [Message("system", prefix + content)]
    first = next((place for place, one in enumerate(messages) if one.role == "user"), None)
    if tools and first is not None:
        definitions = "".join(write_json(canonicalize_tool(tool), indent=4) + "\n\n" for tool in tools)
        messages[first] = replace(messages[first], content=LLAMA_INSTRUCTION + definitions + messages[first].content)
    return [_write_out_llama_turn(message, tools) for message in messages]


def _write_out_llama_turn(message: Message, tools: Sequence[Mapping[str, Any]]) -> Message:
    if message.role == "tool":
        return replace(message, role="ipython")
    if not message.tool_calls:
        return message
    if len(message.tool_calls) > 1:
        raise ValueError(
            f"Llama's format allows one call per turn, got {len(message.tool_calls)}; write one call after the other"
        )
    if message.content:
        raise ValueError(f"Llama's format allows no text beside a call, got {message.content[:40]!r}; remove it")
    call = message.tool_calls[0]
    content = f'{{"name": {write_json(call["name"])}, "parameters": {write_json(order_arguments(call, tools))}}}'
    return replace(message, content=content, tool_calls=())


def write_out_chatml(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], prefix: str) -> list[Message]:
    """Return the plain messages of ChatML's format. Adjacent results are one user message."""
    messages = list(messages)
    if tools:
        has_system = bool(messages) and messages[0].role == "system"
        begin = messages[0].content + "\n\n" if has_system and messages[0].content else ""
        definitions = "".join("\n" + write_json(canonicalize_tool(tool)) for tool in tools)
        content = begin + CHATML_INSTRUCTION + definitions + CHATML_CALL_INSTRUCTION
        messages[:has_system] = [Message("system", content)]
    written: list[Message] = []
    for is_result, group in groupby(messages, key=lambda message: message.role == "tool"):
        if is_result:
            results = [f"<tool_response>\n{message.content}\n</tool_response>" for message in group]
            written.append(Message("user", "\n".join(results)))
        else:
            written += (_write_out_chatml_turn(message, tools) for message in group)
    return written


def _write_out_chatml_turn(message: Message, tools: Sequence[Mapping[str, Any]]) -> Message:
    if not message.tool_calls:
        return message
    parts = [message.content] if message.content else []
    for call in message.tool_calls:
        arguments = write_json(order_arguments(call, tools))
        parts.append(f'<tool_call>\n{{"name": {write_json(call["name"])}, "arguments": {arguments}}}\n</tool_call>')
    return replace(message, content="\n".join(parts), tool_calls=())


WriteOut = Callable[[Sequence[Message], Sequence[Mapping[str, Any]], str], list[Message]]
