"""Files to rows: JSONL, JSON array, CSV and Parquet, each row with the file and line it came from.

`datasets` reads hub data sets only: of local files it tells neither a row's line nor every fault at once.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

MAX_ROW_BYTES = 4 * 2**20  # about a million tokens, far beyond any max_seq_len
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
_HUB_NAME = re.compile(r"hub:(?P<path>[^:]+?)(:(?P<split>[\w.\[\]%-]+))?")


@dataclass(frozen=True)
class Source:
    """Where a row stands. `line` counts from 1; in Parquet files and hub data sets it is the number of the row."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}"


@dataclass(frozen=True)
class Row:
    """A row as read: its value, or what is wrong with it."""

    source: Source
    value: Any = None
    problem: str | None = None


def find_files(patterns: str | Sequence[str]) -> list[str]:
    """Return the files that paths and globs name, in order and each once; names of hub data sets stay as they are.

    Raises:
        ValueError: with every path that does not exist, glob that fits nothing, file that is empty or of no known type
    """
    names, problems = [], []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not isinstance(pattern, str):
            problems.append(f"files must be paths, got {pattern!r}")
        elif pattern.startswith("hub:"):
            names.append(pattern)
        else:
            found = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
            problems += [] if found else [f"{pattern}: no such file"]
            names += found
    names = list(dict.fromkeys(names))
    problems += [problem for name in names for problem in _find_file_problems(name)]
    if problems:
        raise ValueError("\n".join(problems))
    return names


def _find_file_problems(name: str) -> Iterator[str]:
    if name.startswith("hub:"):
        if not _HUB_NAME.fullmatch(name):
            yield f"{name}: a hub data set is written hub:OWNER/NAME, hub:OWNER/NAME/CONFIG or either with :SPLIT"
        return
    path = Path(name)
    if not path.is_file():
        yield f"{name}: not a file; name files or a glob such as {name.rstrip('/')}/*.jsonl"
    elif _get_suffix(path) not in SUFFIXES:
        yield f"{name}: unknown type; known are {', '.join(SUFFIXES)}, each but .parquet also with .gz"
    elif path.stat().st_size == 0:
        yield f"{name}: the file is empty"


def _get_suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        # Parquet needs random access and is compressed inside.
        return suffixes[-2] if len(suffixes) > 1 and suffixes[-2] != ".parquet" else ".gz"
    return suffixes[-1] if suffixes else ""


def read_rows(name: str) -> Iterator[Row]:
    """Yield the rows of one file that find_files returned; blank lines are no rows.

    A row that cannot be read is yielded with its problem. Nothing is skipped.
    """
    if name.startswith("hub:"):
        yield from _read_hub(name)
        return
    suffix = _get_suffix(Path(name))
    if suffix == ".parquet":
        yield from _read_parquet(name)
        return
    with _open(Path(name)) as file:
        if suffix == ".csv":
            yield from _read_csv(name, file)
        elif suffix == ".json" and _is_array(file):
            yield from _read_json_array(name, file)
        else:
            yield from _read_json_lines(name, file)


def _open(path: Path) -> BinaryIO:
    """Open for reading bytes, unpacked where the name ends in .gz, behind a byte order mark."""
    file = (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb")
    if file.read(3) != b"\xef\xbb\xbf":
        file.seek(0)
    return file


def _is_array(file: BinaryIO) -> bool:
    start = file.tell()
    first = next((chunk.strip()[:1] for chunk in iter(lambda: file.read(4096), b"") if chunk.strip()), b"")
    file.seek(start)
    return first == b"["


def _read_json_lines(name: str, file: BinaryIO) -> Iterator[Row]:
    for number, line in enumerate(_read_lines(file), start=1):
        source = Source(name, number)
        if len(line) > MAX_ROW_BYTES:
            yield Row(source, problem=_describe_too_long(len(line)))
        elif line.strip():
            yield _parse_json(line, source)


def _read_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines; of a line beyond the limit only so much is kept in memory that its length shows."""
    while line := file.readline(MAX_ROW_BYTES + 2):
        if len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
            length = len(line)
            while rest := file.readline(MAX_ROW_BYTES):
                length += len(rest)
                if rest.endswith(b"\n"):
                    break
            line = bytes(length)
        yield line


def _describe_too_long(num_bytes: int) -> str:
    return f"the row is {num_bytes / 2**20:.1f} MiB long; the limit is {MAX_ROW_BYTES // 2**20} MiB, so split it"


def _parse_json(line: bytes, source: Source) -> Row:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        hint = "; the file looks like UTF-16, save it as UTF-8" if line[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        return Row(source, problem=f"invalid UTF-8 at byte {error.start} of the line{hint}")
    except json.JSONDecodeError as error:
        return Row(source, problem=f"malformed JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return Row(source, problem="malformed JSON: nested too deeply")
    return _require_object(value, source)


def _require_object(value: Any, source: Source) -> Row:
    if not isinstance(value, dict):
        kind = {list: "a list", str: "a string", type(None): "null"}.get(type(value), f"a {type(value).__name__}")
        return Row(source, problem=f"a row must be a JSON object, got {kind}")
    return Row(source, value)


def _read_json_array(name: str, file: BinaryIO) -> Iterator[Row]:
    raw = file.read()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        yield Row(
            Source(name, line), problem=f"invalid UTF-8 at byte {error.start} of the file; nothing of it was read"
        )
        return
    skip = re.compile(r"[ \t\r\n]*").match
    decoder = json.JSONDecoder()
    position, line, counted = skip(text, text.index("[") + 1).end(), 1, 0
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        source = Source(name, line)
        try:
            value, end = decoder.raw_decode(text, position)
        except (json.JSONDecodeError, RecursionError) as error:
            problem = f"malformed JSON: {getattr(error, 'msg', 'nested too deeply')}; nothing after it was read"
            yield Row(source, problem=problem)
            return
        num_bytes = end - position
        yield (
            _require_object(value, source)
            if num_bytes <= MAX_ROW_BYTES
            else Row(source, problem=_describe_too_long(num_bytes))
        )
        position = skip(text, end).end()
        if text[position : position + 1] == ",":
            position = skip(text, position + 1).end()
        elif text[position : position + 1] != "]":
            problem = "malformed JSON: ',' or ']' expected after this row; nothing after it was read"
            yield Row(Source(name, line + text.count("\n", counted, position)), problem=problem)
            return
    if text[position + 1 :].strip():
        yield Row(Source(name, text.count("\n", 0, position) + 1), problem="malformed JSON: text after the array's end")


def _read_csv(name: str, file: BinaryIO) -> Iterator[Row]:
    # Bytes that are no UTF-8 become surrogates here, so that only their row is at fault.
    text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
    csv.field_size_limit(MAX_ROW_BYTES)
    reader = csv.reader(text, strict=True)
    header: list[str] | None = None
    start = 1
    while True:
        source = Source(name, start)
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Row(source, problem=f"malformed CSV: {error}; nothing after it was read")
            return
        start = reader.line_num + 1
        if not cells:
            continue
        if header is None:
            header = cells
            if len(set(header)) < len(header):
                yield Row(source, problem="the CSV header names a column twice; nothing after it was read")
                return
            continue
        yield _make_csv_row(source, header, cells)


def _make_csv_row(source: Source, header: list[str], cells: list[str]) -> Row:
    if len(cells) != len(header):
        return Row(source, problem=f"{len(cells)} cells where the header names {len(header)} columns")
    if any("\udc80" <= character <= "\udcff" for cell in cells for character in cell if not cell.isascii()):
        return Row(source, problem="invalid UTF-8")
    value: dict[str, Any] = dict(zip(header, cells, strict=True))
    for key in ("messages", "conversations"):
        if key in value:
            try:
                value[key] = json.loads(value[key])
            except json.JSONDecodeError as error:
                return Row(source, problem=f"column {key!r}: malformed JSON: {error.msg} at column {error.colno}")
    return Row(source, value)


def _read_parquet(name: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(name) as file:
            for batch in file.iter_batches(batch_size=1000):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(Source(name, number), value)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        yield Row(Source(name, number + 1), problem=f"cannot be read as Parquet ({error}); nothing after it was read")


def _read_hub(name: str) -> Iterator[Row]:
    from datasets import load_dataset

    match = _HUB_NAME.fullmatch(name)
    assert match is not None, "find_files has checked the name"
    owner_and_name, config = match["path"], None
    if owner_and_name.count("/") == 2:
        owner_and_name, config = owner_and_name.rsplit("/", 1)
    rows = load_dataset(owner_and_name, config, split=match["split"] or "train")
    for number, value in enumerate(rows, start=1):
        yield Row(Source(name, number), value)
