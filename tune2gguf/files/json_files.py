"""JSON files from outside: values are checked as they are read, and errors name file, key and value."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from tune2gguf.files.records import AnyRecord, make_record

_MAX_SHOWN = 80  # characters of a value
_NEEDED = object()

T = TypeVar("T")
parse_object = partial(make_record, AnyRecord)


def read_json(path: Path, parse: Callable[[Any], T] = parse_object) -> T:
    """Read a JSON object and return it parsed.

    Raises:
        ValueError: names the file, if it is missing, is not a JSON object, or `parse` refuses it
    """
    if not path.is_file():
        raise ValueError(f"{path}: not found")
    return parse_text(path.read_text(encoding="utf-8", errors="replace"), parse, place=str(path))


def parse_text(text: str, parse: Callable[[Any], T], *, place: str) -> T:
    """Return a JSON text parsed. Raises ValueError in one line that names the place."""
    try:
        return parse(json.loads(text))
    except RecursionError:
        raise ValueError(f"{place}: cannot be read as JSON (nested too deeply)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: cannot be read as JSON ({error})") from None
    except ValueError as error:
        # Python's message on numbers of more than 4300 digits ends with an interpreter setting.
        raise ValueError(f"{place}: {str(error).partition('; use sys.')[0]}") from None


@dataclass(frozen=True)
class JsonObject:
    """The object of a JSON file, or an object inside it. Errors put `prefix` before its keys."""

    path: Path
    values: dict[str, Any]
    prefix: str = ""

    def refuse(self, key: str, why: str) -> NoReturn:
        """Raise ValueError for a missing key or a wrong value."""
        shown = repr(self.values[key]) if key in self.values else "missing"
        shown = shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}…"
        raise ValueError(f"{self.path}: {self.prefix}{key} is {shown}; {why}")

    def open(self, key: str) -> JsonObject | None:
        """Return the object under a key, None if it is missing, null or empty."""
        value = self.values.get(key)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            self.refuse(key, "it must be an object")
        return JsonObject(self.path, value, f"{self.prefix}{key}.")

    def read(self, key: str, kind: type, *, minimum: float = 1, maximum: float, default: Any = _NEEDED) -> Any:
        """Return the number under a key, `default` if it is missing.

        Args:
            kind: int, or float, which also accepts a whole number
        """
        if key not in self.values and default is not _NEEDED:
            return default
        value, accepted = self.values.get(key), (int, float) if kind is float else int
        if isinstance(value, bool) or not isinstance(value, accepted) or not minimum <= value <= maximum:
            what = "a whole number" if kind is int else "a number"
            self.refuse(key, f"it must be {what} from {minimum:g} to {maximum:g}")
        return kind(value)
