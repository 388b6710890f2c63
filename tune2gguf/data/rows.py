"""Rows of data files (JSONL, JSON array, CSV, Parquet) and hub data sets, each with its file and line.

A file is read in blocks, in order, and any process can parse a block by itself. `datasets` reads hub data sets only:
for local files it reports neither a row's line nor all problems at once.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tune2gguf.files.digest import digest_file

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import RecordBatch

MAX_ROW_BYTES = 4 * 2**20  # about a million tokens, far beyond any max_seq_len
# After an unclosed quote, the rest of a CSV file is one cell: this limits its memory.
_MAX_CELL_CHARACTERS = 64 * 2**20
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
# hub:OWNER/NAME, then /CONFIG, @REVISION and :SPLIT in this order; a branch's name may hold slashes.
_HUB_NAME = re.compile(
    r"hub:(?P<path>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(@(?P<revision>[\w.-]+(/[\w.-]+)*))?(:(?P<split>[^/@]+))?"
)
BLOCK_BYTES = 2**20  # what a process parses at a time
_BLOCK_ROWS = 1000
_COMMIT = re.compile("[0-9a-f]{40}")
# What surrogateescape makes of bytes that are not UTF-8.
_INVALID_BYTE = re.compile("[\udc80-\udcff]")
# First bytes of files whose content is not the text that their name says.
_OTHER_CONTENTS = {
    b"\xff\xfe": "is UTF-16; save it as UTF-8",
    b"\xfe\xff": "is UTF-16; save it as UTF-8",
    b"\x1f\x8b": "is gzip-compressed; its name must end in .gz",
    b"PK\x03\x04": "is a zip archive; unpack it",
    b"PAR1": "is a Parquet file; its name must end in .parquet",
    b"version https://git-lfs": "is a Git LFS pointer; get the file with git lfs pull",
}


@dataclass(frozen=True)
class Source:
    """The place of a row: file and line, or row number in a file without lines (JSON array, Parquet, hub data set)."""

    file: str
    line: int  # from 1
    unit: str = "line"  # line | row

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.line}"


@dataclass(frozen=True)
class Row:
    """A row as read: its value, or its problem."""

    source: Source
    value: Any = None
    problem: str | None = None


@dataclass(frozen=True)
class Block:
    """Consecutive rows of a file.

    Attributes:
        name: the file
        start: line, or number, of the first row
        content: lines of JSON, or rows as they were read, or a batch of a Parquet file
        position: how much of the file has been read, in measure_file's unit
    """

    name: str
    start: int
    content: bytes | list[Row] | RecordBatch
    position: int


def is_hub(name: str) -> bool:
    return name.startswith("hub:")


def find_files(patterns: str | Sequence[str]) -> list[str]:
    """Return the files of paths and globs, in order and each once. Names of hub data sets are kept.

    Raises:
        ValueError: lists every missing path, glob without a match, empty file and file of an unknown type
    """
    names, problems = [], []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not isinstance(pattern, str) or not pattern:
            problems.append(f"files must be paths, got {pattern!r}")
        elif is_hub(pattern):
            names.append(pattern)
        else:
            pattern = os.path.expanduser(pattern)
            found = [pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern, recursive=True))
            is_name = re.fullmatch(r"[\w-]+/[\w.-]+", pattern) and _get_suffix(Path(pattern)) not in SUFFIXES
            hint = f"; for the hub data set write hub:{pattern}" if is_name else ""
            problems += [] if found else [f"{pattern}: no such file{hint}"]
            names += found
    names = list(dict.fromkeys(names))
    problems += [f"{name}: {problem}" for name in names if (problem := _find_file_problem(name))]
    if problems:
        raise ValueError("\n".join(problems))
    return names


def _find_file_problem(name: str) -> str | None:
    if is_hub(name):
        form = "a hub data set is written hub:OWNER/NAME[/CONFIG][@REVISION][:SPLIT]"
        return None if _HUB_NAME.fullmatch(name) else form
    path = Path(name)
    if os.path.isdir(path):
        return f"a folder; name files or a glob such as {name.rstrip('/')}/*.jsonl"
    if os.path.islink(path) and not os.path.exists(path):
        return "a broken link"
    if not os.path.isfile(path):
        return "not a regular file"
    try:
        path.open("rb").close()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if _get_suffix(path) not in SUFFIXES:
        return f"unknown type; known are {', '.join(SUFFIXES)}, each but .parquet also with .gz"
    return "the file is empty" if path.stat().st_size == 0 else None


def _get_suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        # Parquet needs random access and is compressed inside.
        return suffixes[-2] if len(suffixes) > 1 and suffixes[-2] != ".parquet" else ".gz"
    return suffixes[-1] if suffixes else ""


def read_rows(name: str, *, lines: Collection[int] | None = None) -> Iterator[Row]:
    """Yield the rows of one file from find_files. Blank lines are not rows.

    An unreadable row is yielded with its problem. No row is skipped.

    Args:
        lines: yield only rows with these `line` numbers; other lines of a JSONL file are not parsed

    Raises:
        ValueError: if the file is damaged and nothing after the damage can be read
    """
    for block in read_blocks(name):
        yield from parse_block(block, lines=lines)


def read_blocks(name: str) -> Iterator[Block]:
    """Yield the blocks of one file from find_files, of about BLOCK_BYTES each except for Parquet.

    Raises:
        ValueError: if the file is damaged and nothing after the damage can be read
    """
    suffix = "" if is_hub(name) else _get_suffix(Path(name))
    if is_hub(name):
        yield from _gather(name, _read_hub(name))
    elif suffix == ".parquet":
        yield from _read_parquet(name)
    else:
        try:
            with _open(Path(name)) as file:
                if suffix == ".csv":
                    yield from _gather(name, _read_csv(name, file), file)
                elif _is_array(name, file):
                    yield from _gather(name, _read_json_array(name, file))
                else:
                    yield from _read_json_lines(name, file)
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{name}: damaged .gz file ({error})") from None


def parse_block(block: Block, *, lines: Collection[int] | None = None) -> Iterator[Row]:
    """Yield the rows of a block, or only those in `lines`."""
    if isinstance(block.content, bytes):
        for number, line in enumerate(io.BytesIO(block.content), start=block.start):
            if (lines is None or number in lines) and not line.isspace():
                yield _parse_line(line, Source(block.name, number))
    elif isinstance(block.content, list):
        yield from (row for row in block.content if lines is None or row.source.line in lines)
    else:
        for number, value in enumerate(block.content.to_pylist(), start=block.start):
            if lines is None or number in lines:
                yield Row(Source(block.name, number, "row"), value)


def _gather(name: str, rows: Iterator[Row], file: BinaryIO | None = None) -> Iterator[Block]:
    """Gather single rows into blocks."""
    number = num_characters = 0
    gathered: list[Row] = []
    for row in rows:
        gathered.append(row)
        number += 1
        values = row.value.values() if isinstance(row.value, dict) else ()
        num_characters += sum(len(value) for value in values if isinstance(value, str))
        if len(gathered) == _BLOCK_ROWS or num_characters >= BLOCK_BYTES:
            yield Block(name, gathered[0].source.line, gathered, number if file is None else _tell(file))
            gathered, num_characters = [], 0
    if gathered:
        yield Block(name, gathered[0].source.line, gathered, number if file is None else _tell(file))


def measure_file(name: str) -> tuple[int | None, str]:
    """Return the last position of a file's blocks (None: unknown before reading) and its unit, "B" or "row"."""
    if is_hub(name):
        return None, "row"
    if _get_suffix(Path(name)) == ".parquet":
        import pyarrow.parquet as pq

        try:
            return pq.read_metadata(name).num_rows, "row"
        except (OSError, ValueError):  # reading it will say why
            return None, "row"
    return Path(name).stat().st_size, "B"


def _tell(file: BinaryIO) -> int:
    """Return how many bytes of the file on disk have been read; compressed bytes for .gz."""
    return file.fileobj.tell() if isinstance(file, gzip.GzipFile) else file.tell()


def compute_content_digest(name: str) -> str:
    """Return a digest of a file's bytes, or the fingerprint that `datasets` gives a hub data set."""
    return _load_hub(name)._fingerprint if is_hub(name) else digest_file(Path(name))


def _open(path: Path) -> BinaryIO:
    """Open a file's bytes after any byte order mark, decompressed if the name ends in .gz."""
    file = (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb")
    beginning = file.read(32)
    for bytes_, said in _OTHER_CONTENTS.items():
        if beginning.startswith(bytes_):
            file.close()
            raise ValueError(f"{path}: the file {said}")
    file.seek(3 if beginning.startswith(b"\xef\xbb\xbf") else 0)
    return file


def _is_array(name: str, file: BinaryIO) -> bool:
    """Return whether the file is one JSON array. Raises ValueError if its first row spans several lines."""
    start, number, line = file.tell(), 1, file.readline(4096)
    while line and not line.strip():
        number, line = number + line.endswith(b"\n"), file.readline(4096)
    file.seek(start)
    if line.strip() == b"{":
        source = Source(name, number)
        raise ValueError(f"{source}: a row must be on one line, or all rows in an array: [{{…}}, {{…}}]")
    return line.strip()[:1] == b"["


def _read_json_lines(name: str, file: BinaryIO) -> Iterator[Block]:
    number = 1
    while content := file.read(BLOCK_BYTES):
        if not content.endswith(b"\n"):
            content += file.readline(MAX_ROW_BYTES + 2)
        last = content.rpartition(b"\n")[2]
        if len(last) > MAX_ROW_BYTES:
            # At most a block of such a line is held in memory.
            length = len(last) + _skip_line(file)
            content = content[: len(content) - len(last)]
            if content:
                yield Block(name, number, content, _tell(file))
            number += content.count(b"\n")
            too_long = Row(Source(name, number), problem=describe_too_long(length))
            yield Block(name, number, [too_long], _tell(file))
            number += 1
        else:
            yield Block(name, number, content, _tell(file))
            number += content.count(b"\n")


def _skip_line(file: BinaryIO) -> int:
    """Skip the rest of the line and return its number of bytes."""
    length = 0
    while rest := file.readline(MAX_ROW_BYTES):
        length += len(rest)
        if rest.endswith(b"\n"):
            break
    return length


def describe_too_long(num_bytes: int) -> str:
    """Return the problem of a row of more than MAX_ROW_BYTES."""
    return f"the row is {num_bytes / 2**20:.1f} MiB long; the limit is {MAX_ROW_BYTES // 2**20} MiB, so split it"


def _parse_line(line: bytes, source: Source) -> Row:
    if len(line) > MAX_ROW_BYTES:
        return Row(source, problem=describe_too_long(len(line)))
    return _parse_json(line.rstrip(b"\r\n"), source)


def _parse_json(line: bytes, source: Source) -> Row:
    try:
        value = _DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Row(source, problem=f"invalid UTF-8 at byte {error.start} of the line")
    except json.JSONDecodeError as error:
        return Row(source, problem=f"malformed JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return Row(source, problem=f"malformed JSON: {_describe_error(error)}")
    return _require_object(value, source)


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. Raises ValueError for a duplicate key: Python's json silently keeps the last value."""
    value = dict(pairs)
    if len(value) < len(pairs):
        key = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"duplicate key {key!r} in an object")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_make_object)


def decode_json(text: str) -> Any:
    """Return the value of a JSON text. Raises ValueError with a one-line message."""
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"malformed JSON: {_describe_error(error)}") from None


def _describe_error(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    # Python's message on numbers of more than 4300 digits ends with an interpreter setting.
    return str(error).partition("; use sys.")[0]


def _require_object(value: Any, source: Source) -> Row:
    if not isinstance(value, dict):
        kind = {list: "a list", str: "a string", type(None): "null"}.get(type(value), f"a {type(value).__name__}")
        return Row(source, problem=f"a row must be a JSON object, got {kind}")
    return Row(source, value)


def _read_json_array(name: str, file: BinaryIO) -> Iterator[Row]:
    text = _decode_whole(name, file.read())
    skip = re.compile(r"[ \t\r\n]*").match
    position = skip(text, text.index("[") + 1).end()
    number = 0
    while text[position : position + 1] != "]":
        number += 1
        source = Source(name, number, "row")
        try:
            value, end = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            reason = f"malformed JSON: {_describe_error(error)}; nothing after it can be read"
            raise ValueError(f"{source}: {reason}") from None
        is_too_long = end - position > MAX_ROW_BYTES
        yield Row(source, problem=describe_too_long(end - position)) if is_too_long else _require_object(value, source)
        position = skip(text, end).end()
        if text[position : position + 1] == ",":
            position = skip(text, position + 1).end()
            if text[position : position + 1] == "]":
                raise ValueError(f"{source}: malformed JSON: ',' after the last row")
        elif text[position : position + 1] != "]":
            raise ValueError(f"{source}: malformed JSON: missing ',' or ']' after this row")
    if text[position + 1 :].strip():
        raise ValueError(f"{name}: malformed JSON: text after the end of the array")


def _decode_whole(name: str, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        source = Source(name, raw.count(b"\n", 0, error.start) + 1)
        raise ValueError(f"{source}: invalid UTF-8 at byte {error.start} of the file") from None


def _read_csv(name: str, file: BinaryIO) -> Iterator[Row]:
    # Invalid UTF-8 becomes surrogates here, so that only its own row is a bad row.
    text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
    csv.field_size_limit(_MAX_CELL_CHARACTERS)
    reader = csv.reader(text, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            source, line = Source(name, line), reader.line_num + 1
            if cells and header is None:
                header = cells
                _check_header(header, source)
            elif cells:
                yield _make_csv_row(source, header, cells)
    except csv.Error as error:
        raise ValueError(f"{Source(name, line)}: malformed CSV: {error}; nothing after it can be read") from None
    finally:
        text.detach()  # else it closes the file, whose position is still needed


def _check_header(header: list[str], source: Source) -> None:
    if len(set(header)) < len(header):
        raise ValueError(f"{source}: the header names a column twice")
    if len(header) == 1 and re.search("[;\t|]", header[0]):
        raise ValueError(f"{source}: the header has one column, {header[0]!r}; separate columns with commas")


def _make_csv_row(source: Source, header: list[str], cells: list[str]) -> Row:
    num_characters = sum(map(len, cells))
    if num_characters > MAX_ROW_BYTES:
        return Row(source, problem=describe_too_long(num_characters))
    if len(cells) != len(header):
        return Row(source, problem=f"{len(cells)} cells, but the header has {len(header)} columns")
    if any(_INVALID_BYTE.search(cell) for cell in cells):
        return Row(source, problem="invalid UTF-8")
    value: dict[str, Any] = dict(zip(header, cells, strict=True))
    for key in ("messages", "conversations"):
        if key in value:
            try:
                value[key] = decode_json(value[key])
            except ValueError as error:
                return Row(source, problem=f"column {key!r}: {error}")
    return Row(source, value)


def _read_parquet(name: str) -> Iterator[Block]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(name) as file:
            for batch in file.iter_batches(batch_size=_BLOCK_ROWS):
                yield Block(name, number + 1, batch, number + len(batch))
                number += len(batch)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: cannot be read as Parquet after row {number} ({error})") from None


def _read_hub(name: str) -> Iterator[Row]:
    for number, value in enumerate(_load_hub(name), start=1):
        yield Row(Source(name, number, "row"), value)


def find_revision(name: str) -> str | None:
    """Return the commit of a hub data set; None for a file."""
    return _find_commit(_load_hub(name)) if is_hub(name) else None


def _find_commit(data: Dataset) -> str | None:
    """Return a data set's commit, which names its folder in the cache of `datasets`; None for a local folder."""
    names = {Path(file["filename"]).parent.name for file in data.cache_files}
    return next((name for name in names if _COMMIT.fullmatch(name)), None)


def _load_hub(name: str) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    match = _HUB_NAME.fullmatch(name)
    assert match is not None, "find_files has checked the name"
    path, revision = match["path"], match["revision"]
    try:
        if revision is not None and not _COMMIT.fullmatch(revision):
            revision = _resolve_revision(path, revision)
        data = load_dataset(path, match["config"], split=match["split"] or "train", revision=revision)
    except (DatasetsError, OSError, ValueError) as error:
        raise ValueError(f"{name}: cannot be loaded from the hub ({' '.join(str(error).split())})") from None
    commit = _find_commit(data)
    if revision is not None and commit != revision:
        # Offline, `datasets` takes what is in its cache, whatever the revision.
        raise ValueError(
            f"{name}: commit {revision} is not in the cache, which holds {commit}, and the hub cannot be reached"
        )
    return data


def _resolve_revision(path: str, revision: str) -> str:
    """Return the current commit of a branch or tag. Raises OSError or ValueError if the hub does not answer."""
    from huggingface_hub import HfApi

    return HfApi().dataset_info(path, revision=revision).sha
