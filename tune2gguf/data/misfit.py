"""Rows that fit no format: their probable kind, and the override that reads them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tune2gguf.commands import format_command, format_overrides

# What public data sets call the parts of a row, the likeliest first.
_PROMPTS = ("prompt", "question", "instruction", "query", "problem", "input", "user", "human", "customer", "request")
_CONTEXTS = ("context", "input", "passage", "document", "background")
_COMPLETIONS = (
    *("completion", "response", "answer", "output", "reply", "chosen", "solution", "target"),
    *("assistant", "bot", "gpt", "summary", "label_text"),
)
_TEXTS = ("text", "content", "body", "document", "article", "story", "code", "markdown")
_ROLES = ("role", "from", "speaker", "author", "sender", "user")
_CONTENTS = ("content", "value", "text", "message", "utterance")


def describe_special_row(row: Mapping[str, Any]) -> str | None:
    """Return why a row whose keys fit a format is something else, None if it is not."""
    if {"parent_id", "role", "text"} <= row.keys():
        return (
            "the row is one message of a conversation tree (parent_id, role, text), expected a whole conversation; "
            "write each path from a prompt to a reply as 'messages'"
        )
    if row.get("label") is False and {"prompt", "completion"} <= row.keys():
        return (
            "'label' is false, which marks a reply that must not be trained; drop such rows with "
            "dataset.on_bad_row=drop, or set dataset.format=prompt_completion if the label means something else"
        )
    return None


def describe_misfit(row: Mapping[str, Any], required_keys: Mapping[str, Sequence[str]]) -> str:
    """Return why a row fits no format, and the override that reads it."""
    preference = _describe_preference(row)
    if preference is not None:
        return preference
    keys = ", ".join(f"{key}: null" if value is None else str(key) for key, value in row.items()) or "none"
    known = "; ".join(f"{name}: {', '.join(required)}" for name, required in required_keys.items())
    overrides = suggest_overrides(row)
    way_out = f"; to read them: {format_way(overrides)}" if overrides else ""
    texts = [key for key, value in row.items() if isinstance(value, str) and value.strip()]
    if not overrides and len(texts) > 1:
        columns = {"dataset.columns": dict(zip(("prompt", "completion"), texts, strict=False))}
        way_out = f"; map two of them to prompt and reply, as in {format_way(columns)}"
    return f"its keys ({keys}) fit no format ({known}){way_out}"


def format_way(overrides: Mapping[str, Any]) -> str:
    """Return overrides as they are typed in a shell."""
    return format_command(*format_overrides(overrides))


def _describe_preference(row: Mapping[str, Any]) -> str | None:
    if not {"chosen", "rejected"} <= row.keys():
        return None
    whole = {"text": "chosen"} if isinstance(row["chosen"], str) else {"messages": "chosen"}
    columns = {"completion": "chosen"} if row.get("prompt") is not None else whole
    return (
        "the row is preference data (chosen, rejected), but training takes one reply; "
        f"to train on the chosen one: {format_way({'dataset.columns': columns})}"
    )


def suggest_overrides(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the overrides that probably read a row, {} if none is likely."""
    turns = next((key for key, value in row.items() if _is_list_of_turns(value)), None)
    if turns is not None:
        return {"dataset.columns": {"messages": turns, **_name_turn_keys(row[turns][0])}}
    texts = [key for key, value in row.items() if isinstance(value, str) and value.strip()]
    prompt = _find(_PROMPTS, texts)
    completion = _find(_COMPLETIONS, [key for key in texts if key != prompt])
    # The context may be empty in this row and filled in others.
    others = [key for key, value in row.items() if isinstance(value, (str, type(None)))]
    context = _find(_CONTEXTS, [key for key in others if key not in (prompt, completion)])
    if prompt is not None and completion is not None:
        answer = {} if completion == "completion" else {"dataset.columns": {"completion": completion}}
        if context is not None:
            return {"dataset.prompt": f"{{{prompt}}}\n\n{{{context}}}", **answer}
        pairs = {"prompt": prompt, "completion": completion}
        return {"dataset.columns": {part: key for part, key in pairs.items() if part != key}}
    text = _find(_TEXTS, texts)
    if text is not None and completion is None and prompt is None:
        return {"dataset.columns": {"text": text}}
    if len(texts) == 2:
        return {"dataset.columns": dict(zip(("prompt", "completion"), texts, strict=True))}
    return {"dataset.columns": {"text": texts[0]}} if len(texts) == 1 and len(row) == 1 else {}


def _find(likely: Sequence[str], keys: Collection[str]) -> str | None:
    """Return the key with the likeliest name: the same name in any case, or else a key with it as one of its words."""
    lowered = {str(key).lower(): key for key in keys}
    for name in likely:
        if name in lowered:
            return lowered[name]
    for name in likely:
        for lower, key in lowered.items():
            if name in lower.replace("-", "_").replace(" ", "_").split("_"):
                return key
    return None


def _is_list_of_turns(value: Any) -> bool:
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(turn, Mapping) for turn in value):
        return False
    return _find(_ROLES, value[0]) is not None and _find(_CONTENTS, value[0]) is not None


def _name_turn_keys(turn: Mapping[str, Any]) -> dict[str, str]:
    """Return the turn's keys for role and content, {} if they are a format's own."""
    if {"from", "value"} <= turn.keys() or {"role", "content"} <= turn.keys():
        return {}
    names = {"role": _find(_ROLES, turn), "content": _find(_CONTENTS, turn)}
    return {part: key for part, key in names.items() if part != key}
