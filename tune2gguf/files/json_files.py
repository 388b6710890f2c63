"""JSON objects that others wrote: what is in them is checked as it is read, and refused with file, key and value."""

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
    """Read a JSON object, and make of it what the file holds.

    Raises:
        ValueError: if the file is missing, is no JSON object, or `parse` refuses it; it names the file
    """
    if not path.is_file():
        raise ValueError(f"{path}: not found")
    return parse_text(path.read_text(encoding="utf-8", errors="replace"), parse, place=str(path))


def parse_text(text: str, parse: Callable[[Any], T], *, place: str) -> T:
    """Return what `parse` makes of a JSON text; a ValueError of either is one line, and names the place."""
    try:
        return parse(json.loads(text))
    except RecursionError:
        raise ValueError(f"{place}: cannot be read as JSON (nested too deeply)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: cannot be read as JSON ({error})") from None
    except ValueError as error:
        # Python's own sentence on numbers of more than 4300 digits goes on about an interpreter setting.
        raise ValueError(f"{place}: {str(error).partition('; use sys.')[0]}") from None


@dataclass(frozen=True)
class JsonObject:
    """The keys of a JSON file, or of an object inside it, whose names then begin with `prefix`."""

    path: Path
    values: dict[str, Any]
    prefix: str = ""

    def refuse(self, key: str, why: str) -> NoReturn:
        """Raise the ValueError of a key that is missing or has a value that cannot be used."""
        shown = repr(self.values[key]) if key in self.values else "missing"
        shown = shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}…"
        raise ValueError(f"{self.path}: {self.prefix}{key} is {shown}; {why}")

    def open(self, key: str) -> JsonObject | None:
        """Return the object under a key, None where it is missing, null or empty."""
        value = self.values.get(key)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            self.refuse(key, "it must be an object")
        return JsonObject(self.path, value, f"{self.prefix}{key}.")

    def read(self, key: str, kind: type, *, minimum: float = 1, maximum: float, default: Any = _NEEDED) -> Any:
        """Return the number under a key, `default` where it is missing.

        Args:
            kind: int or float, for which a whole number will do
        """
        if key not in self.values and default is not _NEEDED:
            return default
        value, accepted = self.values.get(key), (int, float) if kind is float else int
        if isinstance(value, bool) or not isinstance(value, accepted) or not minimum <= value <= maximum:
            what = "a whole number" if kind is int else "a number"
            self.refuse(key, f"it must be {what} from {minimum:g} to {maximum:g}")
        return kind(value)
