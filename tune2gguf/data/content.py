"""Turns as other tools spell them: content in parts, and whether a reply is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TEXT_TYPES = ("text", "input_text", "output_text")
_PART_TEXT_KEYS = ("text", "value", "content")
# OpenAI and Mistral: weight; others: loss_weight. axolotl: train, training; ms-swift: loss.
WEIGHT_KEYS = ("weight", "loss_weight")
FLAG_KEYS = ("train", "training", "loss")
# axolotl's spans of characters of a reply.
_SPAN_KEYS = ("train_detail", "training_detail")


def join_parts(content: Any, place: str) -> Any:
    """Return the text of content in parts; anything else as it is.

    llama.cpp joins texts by a line break, but for empty ones in front, where a chat template takes no parts.

    Raises:
        ValueError: if a part is no text
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
    # Tables fill with null what a part does not have.
    held = {key: value for key, value in part.items() if value is not None}
    kind = held.get("type", "text" if any(key in held for key in _PART_TEXT_KEYS) else "/".join(map(str, held)))
    if kind not in _TEXT_TYPES:
        raise ValueError(f"{place} is of type {kind!r}; only parts of type 'text' can be trained")
    text = next((held[key] for key in _PART_TEXT_KEYS if key in held), None)
    if not isinstance(text, str):
        raise ValueError(f"{place} is of type {kind!r}, but has no text under {', '.join(_PART_TEXT_KEYS)}")
    return text


def read_is_trained(turn: Mapping[str, Any], place: str) -> bool:
    """Return whether a turn is trained, by any of the keys that say so; without one it is.

    Raises:
        ValueError: if a key holds something between yes and no, two contradict, or spans of a turn are marked
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
