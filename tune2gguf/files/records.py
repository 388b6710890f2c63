"""Records from JSON: values are checked against the annotations of a dataclass or TypedDict."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from types import UnionType
from typing import Any, TypedDict, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

T = TypeVar("T")


class AnyRecord(TypedDict):
    """A JSON object with any keys."""


def make_record(kind: type[T], values: Any) -> T:
    """Return a JSON object as a dataclass or TypedDict. Unknown keys, which newer versions may add, are accepted.

    Raises:
        ValueError: if `values` is not an object, a key is missing, or a value does not fit its annotation
    """
    if not isinstance(values, dict):
        raise ValueError(f"holds {_describe(values)}, expected a JSON object")
    hints = _get_hints(kind)
    missing = [name for name in _list_required(kind) if name not in values]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    found = {name: values[name] for name in hints if name in values}
    for name, value in found.items():
        if not _fits(value, hints[name]):
            raise ValueError(f"its {name!r} is {_describe(value)}")
    if is_typeddict(kind):
        return values
    return kind(**{name: tuple(value) if get_origin(hints[name]) is tuple else value for name, value in found.items()})


@cache
def _get_hints(kind: type) -> Mapping[str, Any]:
    return get_type_hints(kind)


@cache
def _list_required(kind: type) -> tuple[str, ...]:
    if is_typeddict(kind):
        return tuple(kind.__required_keys__)
    missing = dataclasses.MISSING
    return tuple(one.name for one in dataclasses.fields(kind) if one.default is one.default_factory is missing)


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a JSON value fits an annotation, recursively. A bool is not a number; a list fits a tuple."""
    kind, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if kind in (Union, UnionType):
        return any(_fits(value, one) for one in arguments)
    if kind is dict:
        return isinstance(value, dict) and all(_fits(one, arguments[1]) for one in value.values())
    if kind in (list, tuple):
        return isinstance(value, list) and all(_fits(one, arguments[0]) for one in value)
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"
