"""Tools in rows: reads definitions, calls and results in OpenAI's and ShareGPT's formats."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tune2gguf.tokenizer.conversation import Message
from tune2gguf.tokenizer.tools import canonicalize_tool, list_unwritten_keys, order_arguments, sort_values, write_json

ROW_KEYS = ("tools", "functions")  # "functions" is OpenAI's older key
TURN_KEYS = ("tool_calls", "function_call", "tool_call_id")
OPENAI_ROLES = {"tool": "tool", "function": "tool"}
SHAREGPT_ROLES = {"function_call": "assistant", "observation": "tool", "tool": "tool"}


def read_tools(row: Mapping[str, Any]) -> tuple[tuple[dict[str, Any], ...], tuple[str, ...]]:
    """Return a row's tool definitions as canonicalize_tool writes them, and their keys that are not written.

    Raises:
        ValueError: if a definition is malformed
    """
    used = [key for key in ROW_KEYS if row.get(key)]
    if not used:
        return (), ()
    if len(used) > 1:
        raise ValueError("the row has both 'tools' and 'functions'; keep one of the two")
    key, value = used[0], _parse(row[used[0]], repr(used[0]))
    if not isinstance(value, list):
        raise ValueError(f"{key!r} must be a list of tools, got {_describe(value)}")
    tools = [_read_tool(tool, f"{key}[{number}]") for number, tool in enumerate(value)]
    names = [tool["function"]["name"] for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{key!r} has two tools named {twice!r}")
    _check_text(tools, repr(key))
    unwritten = tuple(dict.fromkeys(one for tool in tools for one in list_unwritten_keys(tool)))
    return tuple(canonicalize_tool(tool) for tool in tools), unwritten


def _read_tool(tool: Any, place: str) -> dict[str, Any]:
    tool = _require_object(tool, place)
    if "function" not in tool and "name" in tool:
        tool = {"type": "function", "function": tool}
    if tool.get("type") not in (None, "function"):
        raise ValueError(f"{place}: 'type' must be 'function', got {tool['type']!r}")
    function = _require_object(tool.get("function"), f"{place}: 'function'")
    _require_name(function.get("name"), place)
    if not isinstance(function.get("description") or "", str):
        raise ValueError(f"{place}: 'description' must be text, got {_describe(function['description'])}")
    parameters = _require_object(function.get("parameters") or {}, f"{place}: 'parameters'")
    if parameters.get("type") not in (None, "object"):
        raise ValueError(f"{place}: 'parameters' must be of type 'object', got {parameters['type']!r}")
    properties = _require_object(parameters.get("properties") or {}, f"{place}: 'properties'")
    # Tables store absent keys as null.
    properties = {key: schema for key, schema in properties.items() if schema is not None}
    for key, schema in properties.items():
        _check_property(_require_object(schema, f"{place}: property {key!r}"), f"{place}: property {key!r}")
    required = parameters.get("required") or []
    if not isinstance(required, list) or any(key not in properties for key in required):
        raise ValueError(f"{place}: 'required' must name properties, got {_describe(required)}")
    return {**tool, "function": {**function, "parameters": {**parameters, "properties": properties}}}


def _check_property(schema: Mapping[str, Any], place: str) -> None:
    kind, values = schema.get("type"), schema.get("enum")
    is_kind = isinstance(kind, str) or (isinstance(kind, list) and all(isinstance(one, str) for one in kind))
    if kind is not None and not is_kind:
        raise ValueError(f"{place}: 'type' must be a name or a list of names, got {_describe(kind)}")
    if not isinstance(schema.get("description") or "", str):
        raise ValueError(f"{place}: 'description' must be text, got {_describe(schema['description'])}")
    if values is not None and (not isinstance(values, list) or any(isinstance(one, (list, dict)) for one in values)):
        raise ValueError(f"{place}: 'enum' must be a list of texts and numbers, got {_describe(values)}")


def read_calls(turn: Mapping[str, Any], place: str) -> tuple[dict[str, Any], ...]:
    """Return the calls of an OpenAI turn, each with name and arguments; () if it has none.

    Raises:
        ValueError: if a call is malformed
    """
    calls = turn.get("tool_calls")
    if calls and turn.get("function_call"):
        raise ValueError(f"{place} has both 'tool_calls' and 'function_call'; keep one of the two")
    if turn.get("function_call"):
        return (_read_call(turn["function_call"], f"{place}: function_call"),)
    calls = _parse(calls or [], f"{place}: 'tool_calls'")
    if not isinstance(calls, list):
        raise ValueError(f"{place}: 'tool_calls' must be a list, got {_describe(calls)}")
    return tuple(_read_call(call, f"{place}: tool_calls[{number}]") for number, call in enumerate(calls))


def read_call_text(value: Any, place: str) -> tuple[dict[str, Any], ...]:
    """Return the calls of a ShareGPT turn of role function_call: an object or a list of objects, or either as JSON."""
    value = _parse(value, place)
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise ValueError(f"{place} holds no call")
    return tuple(_read_call(call, place) for call in calls)


def _read_call(call: Any, place: str) -> dict[str, Any]:
    call = _require_object(call, place)
    if call.get("function"):
        call = _require_object(call["function"], f"{place}: 'function'")
    _require_name(call.get("name"), place)
    arguments = call.get("arguments")
    if arguments is None:
        arguments = call.get("parameters")
    arguments = {} if arguments in (None, "") else _parse(arguments, f"{place}: 'arguments'")
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{place}: 'arguments' must be an object, got {_describe(arguments)}")
    _check_text([call["name"], arguments], place)
    return {"name": call["name"], "arguments": sort_values(arguments)}


def order_calls(message: Message, tools: Sequence[Mapping[str, Any]]) -> Message:
    """Return the message with its calls' arguments in the order of order_arguments."""
    if not message.tool_calls:
        return message
    calls = tuple({"name": call["name"], "arguments": order_arguments(call, tools)} for call in message.tool_calls)
    return replace(message, tool_calls=calls)


def read_result(content: Any) -> Any:
    """Return an object or a list as JSON text; content in parts and other results unchanged."""
    is_parts = isinstance(content, list) and all(isinstance(one, Mapping) and "text" in one for one in content)
    return write_json(content) if isinstance(content, (Mapping, list)) and not is_parts else content


def find_call_problem(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], turns: Sequence[Mapping[str, Any]] = ()
) -> str | None:
    """Return the problem of a conversation's calls and results (order, ids, unknown tools), or None.

    Args:
        turns: the row's turns, whose ids link results to calls; () for formats without ids
    """
    names = [tool["function"]["name"] for tool in tools]
    open_calls, ids = 0, []
    for number, message in enumerate(messages, start=1):
        if message.role == "tool":
            if open_calls == 0:
                return f"message {number} has role 'tool', but no call before it lacks a result"
            open_calls -= 1
            id_ = turns[number - 1].get("tool_call_id") if turns else None
            if id_ and ids and id_ not in ids:
                return f"message {number}: tool_call_id {id_!r} matches no call before it ({', '.join(ids)})"
            continue
        if open_calls:
            return (
                f"message {number} has role {message.role!r}, expected 'tool'; "
                f"{open_calls} results of the calls before it are missing"
            )
        if message.tool_calls and message.role != "assistant":
            return f"message {number} has role {message.role!r} and calls a tool; only 'assistant' can"
        unknown = next((call["name"] for call in message.tool_calls if call["name"] not in names), None)
        if unknown is not None:
            known = f"the row's tools are {', '.join(names)}" if names else "the row has no 'tools'"
            return f"message {number} calls unknown tool {unknown!r}; {known}"
        open_calls = len(message.tool_calls)
        calls = _parse(turns[number - 1].get("tool_calls") or [], "") if turns else []
        ids = [call["id"] for call in calls if isinstance(call.get("id"), str) and call["id"]]
    return None


def _parse(value: Any, place: str) -> Any:
    """Return a value; text is parsed as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "too deep"
        raise ValueError(f"{place}: malformed JSON: {reason}") from None


def _check_text(value: Any, place: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{place} holds a lone surrogate") from None
    except ValueError:
        raise ValueError(f"{place} holds a number that JSON does not have, such as NaN") from None


def _require_object(value: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{place} must be an object, got {_describe(value)}")
    return value


def _require_name(name: Any, place: str) -> None:
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{place}: 'name' must be non-empty text, got {_describe(name)}")


def _describe(value: Any) -> str:
    text = "null" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
