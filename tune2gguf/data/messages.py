"""Row formats: a row of a data file becomes the messages of a conversation, or raw text.

torchtune's message transforms are not used: they need four seconds of imports before a file can be checked, turn a
`content` of null into the previous message's text, and pass unknown roles through as literal headers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tune2gguf.data import tools
from tune2gguf.data.content import FLAG_KEYS, WEIGHT_KEYS, join_parts, read_is_trained
from tune2gguf.data.misfit import describe_misfit, describe_special_row
from tune2gguf.tokenizer.conversation import ROLES, Conversation, Message
from tune2gguf.tokenizer.templates import CHAT_TEMPLATES
from tune2gguf.tokenizer.tokenizer import END_OF_TEXT_TOKENS

DIGEST_BYTES = 16
# Of every template: data sets written for another base are common.
_ENDS = (*dict.fromkeys(template.end_of_turn for template in CHAT_TEMPLATES.values()), *END_OF_TEXT_TOKENS)

# The keys that a row must have, by which its format is detected.
_REQUIRED_KEYS = {
    "openai": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
FORMATS = tuple(_REQUIRED_KEYS)

_LISTS = ("openai", "sharegpt")

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", **{role: role for role in ROLES}, **tools.SHAREGPT_ROLES}

# Optional keys of a row, and of a turn beside role and content. All other keys count as unused.
_OPTIONAL_KEYS = {"openai": ("system",), "sharegpt": ("system",), "alpaca": ("input", "system")}
_OPTIONAL_KEYS |= {"prompt_completion": ("system",), "text": ()}
_OPTIONAL_TURN_KEYS = WEIGHT_KEYS + FLAG_KEYS
# The parts of each format and of its turns, which dataset.columns may map.
_TURN_PARTS = {"openai": ("conversations", "role", "content"), "sharegpt": ("messages", "from", "value")}
PARTS = {name: (*_REQUIRED_KEYS[name], *_OPTIONAL_KEYS[name], *_TURN_PARTS.get(name, ())) for name in FORMATS}


@dataclass(frozen=True)
class _Shape:
    """The keys of a format's list of messages, role and content, and the names of its roles."""

    list_keys: tuple[str, ...]
    role_key: str
    content_key: str
    roles: Mapping[str, str]


_OPENAI_ROLES = {role: role for role in ROLES} | tools.OPENAI_ROLES
_OPENAI = _Shape(("messages", "conversations"), "role", "content", _OPENAI_ROLES)
_SHAREGPT = _Shape(("conversations", "messages"), "from", "value", _SHAREGPT_ROLES)


class AmbiguousFormatError(ValueError):
    """A row fits more than one format, and only the user can choose."""


def digest(conversation: Conversation) -> bytes:
    """Return a digest of DIGEST_BYTES bytes, equal for rows that train the same in any format or spacing."""
    turns = [(message.role, message.content, message.is_trained) for message in conversation.messages]
    content: list[Any] = [turns, conversation.text]
    calls = [message.tool_calls for message in conversation.messages]
    # Without tools, nothing is added: the digest decides a row's split, which must not change between versions.
    content += [calls, conversation.tools] if any(calls) or conversation.tools else []
    return hashlib.blake2b(repr(tuple(content)).encode(), digest_size=DIGEST_BYTES).digest()


def detect_format(row: Mapping[str, Any], *, among: Sequence[str] = FORMATS, is_mapped: bool = False) -> str:
    """Return the format of a row, by its keys.

    Args:
        among: the candidates
        is_mapped: whether the keys come from the user's mapping

    Raises:
        AmbiguousFormatError: if more than one format fits
        ValueError: if none fits
    """
    special = None if is_mapped else describe_special_row(row)
    if special is not None:
        raise ValueError(special)
    fitting = [name for name in among if _has_keys(row, name, among)]
    if fitting == ["alpaca", "text"]:
        fitting.remove("text")  # the published Alpaca file also has the rendered row as text
    if len(fitting) > 1:
        raise AmbiguousFormatError(
            f"its keys fit the formats {' and '.join(fitting)}; say which with dataset.format={fitting[0]}"
        )
    if not fitting:
        raise ValueError(describe_misfit(row, {name: _REQUIRED_KEYS[name] for name in among}))
    # Public data sets use either name for the list in either format: the keys of a turn decide.
    if set(_LISTS) <= set(among) and fitting[0] in _LISTS:
        turns = row[_REQUIRED_KEYS[fitting[0]][0]]
        if isinstance(turns, list) and turns and isinstance(turns[0], Mapping):
            return "sharegpt" if "from" in turns[0] and "role" not in turns[0] else "openai"
    return fitting[0]


def _has_keys(row: Mapping[str, Any], format: str, among: Sequence[str]) -> bool:
    if format in _LISTS and not set(_LISTS) <= set(among):
        return any(row.get(_REQUIRED_KEYS[name][0]) is not None for name in _LISTS)  # either name of the list
    return all(row.get(key) is not None for key in _REQUIRED_KEYS[format])


def read_conversation(row: Mapping[str, Any], *, format: str) -> Conversation:
    """Return the conversation of a row in the named format (one of FORMATS).

    White space around contents is removed: clients send none, and no template strips it when serving.

    Raises:
        ValueError: if the row is not in the format or cannot be trained on
    """
    definitions, unwritten = tools.read_tools(row)
    used = {*_REQUIRED_KEYS[format], *_OPTIONAL_KEYS[format]}
    if format == "text":
        if definitions:
            raise ValueError("a raw text cannot have tools; give the turns as 'messages'")
        read = _read_text(row, "text")
        text = _take_end_off(read)
        if not text.strip():
            raise ValueError("'text' is empty")
        return Conversation(text=text, unused_keys=_find_unused(row, used), had_end=text != read)
    unused_in_turns: tuple[str, ...] = ()
    turns: list[Mapping[str, Any]] = []
    if format == "alpaca":
        messages = _read_alpaca(row)
    elif format == "prompt_completion":
        messages = _read_prompt_completion(row)
    else:
        shape = _OPENAI if format == "openai" else _SHAREGPT
        key = _find_list_key(row, shape)
        messages = _read_turns(row[key], shape, key)
        turns = row[key]
        used = {key, *_OPTIONAL_KEYS[format]}  # key may be the list's other name
        unused_in_turns = _find_unused_in_turns(turns, shape, key)
    problem = tools.find_call_problem(messages, definitions, turns)
    if problem is not None:
        raise ValueError(problem)
    read = _put_system_first(row, [tools.order_calls(message, definitions) for message in messages])
    ended = [replace(message, content=_take_end_off(message.content)) for message in read]
    messages = [replace(message, content=message.content.strip()) for message in ended]
    _check_messages(messages)
    return Conversation(
        tuple(messages),
        tools=definitions,
        unused_keys=_find_unused(row, used | {*tools.ROW_KEYS}) + unused_in_turns + unwritten,
        had_end=ended != read,
        was_stripped=messages != ended,
    )


def _take_end_off(text: str) -> str:
    """Remove one end-of-turn or end-of-text token from the end: the chat template adds its own."""
    stripped = text.rstrip()
    end = next(filter(stripped.endswith, _ENDS), None)
    return text if end is None else stripped.removesuffix(end)


def _find_unused(values: Mapping[str, Any], used: Collection[str]) -> tuple[str, ...]:
    """Return the unused keys that are not empty; tables store absent keys as null."""
    return tuple(key for key in values if key not in used and values[key] not in (None, "", []))


def _find_unused_in_turns(turns: list[Mapping[str, Any]], shape: _Shape, list_key: str) -> tuple[str, ...]:
    used = (shape.role_key, shape.content_key, *_OPTIONAL_TURN_KEYS, *tools.TURN_KEYS)
    names: list[str] = []
    for turn in turns:
        if len(turn) > 2:
            role = shape.roles[turn[shape.role_key]]
            # A result may name the called function.
            known = (*used, "name") if role == "tool" else used
            names += [f"{list_key}[].{key}" for key in _find_unused(turn, known)]
            # Only replies are trained: a weight on another turn has no effect.
            asked = [key for key in _OPTIONAL_TURN_KEYS if turn.get(key) and role != "assistant"]
            names += [f"{list_key}[].{key} of the {role}" for key in asked]
    return tuple(dict.fromkeys(names))


def _put_system_first(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """Put the row's 'system', if it has one, first as the system message."""
    if row.get("system") in (None, ""):
        return messages
    system = _read_text(row, "system")
    if messages[0].role == "system":
        raise ValueError("the row has both 'system' and a system message; keep one of the two")
    return [Message("system", system), *messages]


def _find_list_key(row: Mapping[str, Any], shape: _Shape) -> str:
    for key in shape.list_keys:
        if row.get(key) is not None:
            return key
    raise ValueError(f"{shape.list_keys[0]!r} is missing; the row has {', '.join(map(str, row)) or 'no keys'}")


def _read_turns(turns: Any, shape: _Shape, key: str) -> list[Message]:
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{key!r} must be a non-empty list, got {_describe(turns)}")
    return [_read_turn(turn, shape, f"{key}[{index}]") for index, turn in enumerate(turns)]


def _read_turn(turn: Any, shape: _Shape, place: str) -> Message:
    if not isinstance(turn, Mapping):
        raise ValueError(
            f"{place} must be an object with {shape.role_key!r} and {shape.content_key!r}, got {_describe(turn)}"
        )
    calls = tools.read_calls(turn, place)
    for key in (shape.role_key, shape.content_key):
        if key not in turn and not (calls and key == shape.content_key):
            raise ValueError(f"{place} has no {key!r}; it has {', '.join(map(str, turn)) or 'no keys'}")
    role = turn[shape.role_key]
    if not isinstance(role, str) or role not in shape.roles:
        raise ValueError(f"{place}: unknown role {role!r}; known are {', '.join(shape.roles)}")
    content = turn.get(shape.content_key)
    if role == "function_call":
        calls, content = tools.read_call_text(content, f"{place}: {shape.content_key!r}"), ""
    elif shape.roles[role] == "tool":
        content = tools.read_result(content)
    elif calls and content is None:
        content = ""
    content = join_parts(content, f"{place}.{shape.content_key}")
    if not isinstance(content, str):
        raise ValueError(f"{place}: {shape.content_key!r} must be text, got {_describe(content)}")
    _check_text(content, f"{place}: {shape.content_key!r}")
    return Message(shape.roles[role], content, is_trained=read_is_trained(turn, place), tool_calls=calls)


def _read_alpaca(row: Mapping[str, Any]) -> list[Message]:
    """Return an alpaca row as two messages, with an empty line between instruction and input.

    Alpaca's own prompt text is left out: a chat model needs no framing.
    """
    if row.get("history"):
        raise ValueError("'history' is not supported in alpaca rows; write the turns as 'messages'")
    prompt = _read_text(row, "instruction")
    if row.get("input") is not None and _read_text(row, "input").strip():
        prompt += "\n\n" + row["input"]
    return [Message("user", prompt), Message("assistant", _read_text(row, "output"))]


def _read_prompt_completion(row: Mapping[str, Any]) -> list[Message]:
    """Return the messages of prompt and completion, each text or a list. Replies in the prompt are not trained."""
    prompt, completion = _read_side(row, "prompt", "user"), _read_side(row, "completion", "assistant")
    if len(completion) > len(prompt) and completion[: len(prompt)] == prompt:
        completion = completion[len(prompt) :]  # 'chosen' often repeats the prompt
    prompt = [replace(one, is_trained=False) if one.role == "assistant" else one for one in prompt]
    return prompt + completion


def _read_side(row: Mapping[str, Any], key: str, role: str) -> list[Message]:
    return (
        _read_turns(row[key], _OPENAI, key) if isinstance(row.get(key), list) else [Message(role, _read_text(row, key))]
    )


def _read_text(row: Mapping[str, Any], key: str) -> str:
    if key not in row:
        raise ValueError(f"{key!r} is missing; the row has {', '.join(map(str, row)) or 'no keys'}")
    if not isinstance(row[key], str):
        raise ValueError(f"{key!r} must be text, got {_describe(row[key])}")
    _check_text(row[key], repr(key))
    return row[key]


def _check_text(text: str, place: str) -> None:
    if "\0" in text:
        raise ValueError(f"{place} holds a NUL byte at character {text.index(chr(0))}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} holds a lone surrogate at character {error.start}") from None


def _check_messages(messages: list[Message]) -> None:
    turns = messages[1:] if messages[0].role == "system" else messages
    if not any(message.role == "assistant" for message in turns):
        raise ValueError("no message has role 'assistant'; there is no reply to train on")
    expected = "user"
    for number, message in enumerate(turns, start=1 + len(messages) - len(turns)):
        if message.role not in (expected, "tool"):  # find_call_problem has checked the results
            raise ValueError(
                f"message {number} has role {message.role!r}, expected {expected!r}; "
                "after an optional system message, user and assistant alternate, user first"
            )
        expected = "user" if message.role == "assistant" and not message.tool_calls else "assistant"
    if turns[-1].role != "assistant":
        raise ValueError(f"the last message has role {turns[-1].role!r}, expected 'assistant'; end with a reply")
    if not any(message.is_trained for message in turns if message.role == "assistant"):
        raise ValueError("every reply has weight 0; there is nothing to train on")
    for index, message in enumerate(messages):
        if message.role in ("user", "assistant") and not message.content.strip() and not message.tool_calls:
            raise ValueError(f"message {index + 1} ({message.role}) is empty")


def _describe(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"
