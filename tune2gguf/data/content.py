"""Other tools' conventions for turns: content as a list of parts, and keys that say whether a reply is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TEXT_TYPES = ("text", "input_text", "output_text")
_PART_TEXT_KEYS = ("text", "value", "content")
# OpenAI and Mistral: weight; others: loss_weight. axolotl: train, training; ms-swift: loss.
WEIGHT_KEYS = ("weight", "loss_weight")
FLAG_KEYS = ("train", "training", "loss")
# axolotl's character spans within a reply.
_SPAN_KEYS = ("train_detail", "training_detail")


def join_parts(content: Any, place: str) -> Any:
    """Return content in parts as one text; other content unchanged.

    Parts are joined by a line break, which leading empty parts do not get. llama.cpp does the same for chat templates
    that take no parts.

    Raises:
        ValueError: if a part is not text
    """
    if not isinstance(content, list) or not content:
        return content
    joined = ""
    for index, part in enumerate(content):
        joined += "\n" * bool(joined) + _read_part(part, f"{place}[{index}]")
    return joined


def _read_part(part: Any, place: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise ValueError(f"{place} must be a part such as {{type: text, text: …}}, got {type(part).__name__}")
    # Tables store absent keys as null.
    held = {key: value for key, value in part.items() if value is not None}
    kind = held.get("type", "text" if any(key in held for key in _PART_TEXT_KEYS) else "/".join(map(str, held)))
    if kind not in _TEXT_TYPES:
        raise ValueError(f"{place} is of type {kind!r}; only parts of type 'text' can be trained")
    text = next((held[key] for key in _PART_TEXT_KEYS if key in held), None)
    if not isinstance(text, str):
        raise ValueError(f"{place} is of type {kind!r} but has no text under {', '.join(_PART_TEXT_KEYS)}")
    return text


def read_is_trained(turn: Mapping[str, Any], place: str) -> bool:
    """Return whether a turn is trained, by WEIGHT_KEYS and FLAG_KEYS; True without any.

    Raises:
        ValueError: if a value is neither yes nor no, two keys contradict each other, or spans of a turn are marked
    """
    found = {}
    for key in WEIGHT_KEYS + FLAG_KEYS:
        value = turn.get(key)
        if value is not None:
            found[key] = _read_flag(key, value, place)
    if len(set(found.values())) > 1:
        raise ValueError(f"{place}: {' and '.join(map(repr, found))} contradict each other")
    spans = next((key for key in _SPAN_KEYS if turn.get(key)), None)
    if spans is not None:
        raise ValueError(f"{place}: {spans!r} marks parts of a turn; a turn is trained whole or not at all")
    return all(found.values())


def _read_flag(key: str, value: Any, place: str) -> bool:
    is_weight = key in WEIGHT_KEYS
    if isinstance(value, bool) != is_weight and isinstance(value, (int, float)) and value in (0, 1):
        return bool(value)
    expected = "0 (not trained) or 1" if is_weight else "true or false"
    raise ValueError(f"{place}: {key!r} must be {expected}, got {value!r}")
