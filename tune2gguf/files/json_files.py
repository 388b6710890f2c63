"""JSON objects that others wrote: what is in them is checked as it is read, and refused with file, key and value."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

_MAX_SHOWN = 80  # characters of a value
_NEEDED = object()


def read_json(path: Path, *, required: Iterable[str] = ()) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: if the file is missing, is not a JSON object, or lacks one of the keys; it names the file
    """
    if not path.is_file():
        raise ValueError(f"{path}: not found")
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except RecursionError:
        raise ValueError(f"{path}: cannot be read as JSON (nested too deeply)") from None
    except ValueError as error:
        # Of numbers with more than 4300 digits Python goes on about an interpreter setting.
        raise ValueError(f"{path}: cannot be read as JSON ({str(error).partition(';')[0]})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a JSON object")
    missing = [key for key in required if key not in content]
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(missing)}")
    return content


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
