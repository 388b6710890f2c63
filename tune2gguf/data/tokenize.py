"""Tokenization of data files: every row is read, checked, rendered and tokenized once, before any selection."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from tune2gguf.data.columns import RowReader
from tune2gguf.data.messages import DIGEST_BYTES, AmbiguousFormatError, digest
from tune2gguf.data.rows import (
    MAX_ROW_BYTES,
    Block,
    Row,
    Source,
    describe_too_long,
    parse_block,
    read_blocks,
    read_rows,
)
from tune2gguf.tokenizer.conversation import Conversation
from tune2gguf.tokenizer.tools import is_written_alike, write_json

if TYPE_CHECKING:
    from tune2gguf.tokenizer.tokenizer import ChatTokenizer, Segment

TOKEN_DTYPE = np.dtype("<i4")
# Limits the memory for data sets with a different system message in each row.
MAX_SYSTEM_PROMPTS = 100
RAW_TEXT = -1


@dataclass(frozen=True)
class TokenizedRow:
    """One row as it is trained, cut to max_seq_len."""

    tokens: np.ndarray  # [seq] int32
    supervised: np.ndarray  # [seq] bool
    source: Source

    @property
    def num_supervised(self) -> int:
        """The number of trained tokens. The first token never is: nothing predicts it."""
        return int(np.count_nonzero(self.supervised[1:]))


@dataclass(frozen=True)
class TokenIndex:
    """The index of a file: the good rows' places among its tokens, and the problems of the others.

    Row i has the tokens offsets[i]:offsets[i + 1].
    """

    offsets: np.ndarray  # [rows + 1] int64
    lines: np.ndarray  # [rows] int64, as in Source
    num_supervised: np.ndarray  # [rows] int64, trained tokens
    first_supervised: np.ndarray  # [rows] int64, position of the first trained token in the row; 0: none
    digests: np.ndarray  # [rows, DIGEST_BYTES] uint8
    problems: list[tuple[int, str]]  # line and reason
    num_characters: int  # of the good rows' text, special tokens not counted
    num_text_tokens: int  # of the good rows, special tokens not counted
    role_counts: dict[str, int]  # messages of the good rows; raw texts count as "text"
    unit: str  # of lines, as in Source
    lines_that_spell_special: list[int]  # special tokens in content are trained as text, but served as special tokens
    format: str  # of the rows; "" if none fits one
    absent_columns: dict[str, int]  # mapped column -> good rows in which it is empty or missing
    num_ended: int  # good rows from which an end-of-turn token was removed
    num_stripped: int  # good rows from which white space around a content was removed
    has_tools: np.ndarray  # [rows] bool, whether the row defines tools
    lines_written_otherwise: list[int]  # tools or calls hold characters that Ollama's template escapes
    unused_keys: dict[str, int]  # unused key -> good rows in which it is not empty
    system_prompts: list[str | None]  # of the good conversations, each once; None: without one
    system_numbers: np.ndarray  # [rows] int64, index into system_prompts, or their number for others, or RAW_TEXT

    @property
    def num_read(self) -> int:
        return len(self.lines) + len(self.problems)


@dataclass(frozen=True)
class TokenizedFile:
    """The good rows of one file, concatenated, and their index."""

    name: str
    reader: RowReader
    tokens: np.ndarray  # [tokens of all rows] int32
    supervised: np.ndarray  # [tokens of all rows] bool
    index: TokenIndex

    def locate(self, line: int) -> Source:
        """Return the place of a line, or row, of the file."""
        return Source(self.name, line, self.index.unit)


@dataclass(frozen=True)
class TokenizedRows(Sequence[TokenizedRow]):
    """A view of rows picked from tokenized files. Each is cut to max_seq_len when it is read.

    Attributes:
        picks: [rows, 3] int64: index into files, row in the file, first token in the row; a row may be picked again
        overlap: tokens that a piece of a row repeats from the piece before; they are not trained again
    """

    files: list[TokenizedFile]
    picks: np.ndarray
    max_seq_len: int
    overlap: int = 1

    def __len__(self) -> int:
        return len(self.picks)

    def __getitem__(self, index: int) -> TokenizedRow:
        file_index, row, first = self.picks[index]
        file = self.files[file_index]
        start, end = file.index.offsets[row : row + 2]
        start += first
        stop = min(end, start + self.max_seq_len)
        supervised = file.supervised[start:stop]
        if first > 0:
            supervised = supervised.copy()
            supervised[: self.overlap] = False
        return TokenizedRow(
            tokens=file.tokens[start:stop],
            supervised=supervised,
            source=file.locate(int(file.index.lines[row])),
        )

    def take(self, rows: Sequence[int]) -> TokenizedRows:
        """Return a view of only these rows, in this order."""
        return TokenizedRows(self.files, self.picks[np.asarray(rows, np.int64)], self.max_seq_len, self.overlap)

    def digests(self) -> list[bytes]:
        """Return a digest of each row's content. Pieces of one row have digests with different ends."""
        firsts = self.picks[:, 2].tolist()
        return [
            bytes(one) + (first.to_bytes(8, "little") if first else b"")
            for one, first in zip(self.row_digests(), firsts, strict=True)
        ]

    def row_digests(self) -> np.ndarray:
        """Return the digest of the whole row behind each pick, [rows, DIGEST_BYTES] uint8."""
        digests = np.zeros((len(self.picks), DIGEST_BYTES), np.uint8)
        for number, file in enumerate(self.files):
            chosen = self.picks[:, 0] == number
            digests[chosen] = file.index.digests[self.picks[chosen, 1]]
        return digests

    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each row, [rows] int64."""
        return np.minimum(self._collect(lambda index: np.diff(index.offsets)) - self.picks[:, 2], self.max_seq_len)

    def supervised_lengths(self) -> np.ndarray:
        """Return the number of trained tokens of each row, [rows] int64."""
        counts = self._collect(lambda index: index.num_supervised)
        whole = self._collect(lambda index: np.diff(index.offsets))
        for row in np.flatnonzero(whole > self.max_seq_len).tolist():
            counts[row] = self[row].num_supervised
        return counts

    def _collect(self, get_values: Callable[[TokenIndex], np.ndarray]) -> np.ndarray:
        values = np.zeros(len(self.picks), np.int64)
        for number, file in enumerate(self.files):
            chosen = self.picks[:, 0] == number
            values[chosen] = get_values(file.index)[self.picks[chosen, 1]]
        return values


@dataclass(frozen=True)
class Decided:
    """The format of a file's rows, and the row it was detected from ("" if the user named it)."""

    format: str
    by: str = ""


def decide_format(name: str, reader: RowReader) -> Decided | None:
    """Return the format of a file: the user's, or that of the first row that fits one; None if no row does.

    Raises:
        ValueError: if that row fits more than one format, or the file is damaged
    """
    if reader.format != "auto":
        return Decided(reader.format)
    for row in read_rows(name):
        if row.problem is None:
            try:
                return Decided(reader.detect(row.value), f"{row.source.unit} {row.source.line}")
            except AmbiguousFormatError as error:
                raise ValueError(f"{row.source}: {error}") from None
            except ValueError:
                continue
    return None


@dataclass(frozen=True)
class BlockTokenizer:
    """Tokenizes the blocks of a file, each by itself."""

    tokenizer: ChatTokenizer
    reader: RowReader
    decided: Decided | None

    def tokenize(self, block: Block, *, only_check: bool = False) -> Part:
        """Return the tokens of a block's good rows and the index of all of its rows.

        Args:
            only_check: only look for bad rows; the result then has no good rows

        Raises:
            ValueError: if the format is to be detected and a row fits more than one
        """
        return _tokenize_rows(
            self._read(parse_block(block)),
            self.tokenizer,
            format="" if self.decided is None else self.decided.format,
            only_check=only_check,
        )

    def _read(self, rows: Iterable[Row]) -> Iterator[tuple[Row, Conversation | str]]:
        """Yield each row with its conversation, or with its problem."""
        for row in rows:
            try:
                yield row, row.problem or self._read_row(row)
            except AmbiguousFormatError as error:
                raise ValueError(f"{row.source}: {error}") from None
            except ValueError as error:
                yield row, str(error)

    def _read_row(self, row: Row) -> Conversation:
        format = self.reader.detect(row.value)
        decided = self.decided or Decided(format)
        if format != decided.format:
            raise ValueError(f"the row has format {format}, but the file has {decided.format} since {decided.by}")
        conversation = self.reader.read(row.value, format=format)
        _check_size(conversation)
        return conversation


def _check_size(conversation: Conversation) -> None:
    """Raise ValueError for more than MAX_ROW_BYTES characters; rows of files without lines are only checked here."""
    num_characters = sum(len(message.content) for message in conversation.messages) + len(conversation.text or "")
    if num_characters > MAX_ROW_BYTES:
        raise ValueError(describe_too_long(num_characters))


def tokenize_file(name: str, tokenizer: ChatTokenizer, *, reader: RowReader, stop_at_problem: bool) -> TokenizedFile:
    """Read and tokenize one file from rows.find_files, in memory.

    Args:
        stop_at_problem: after a bad row, only look for more bad rows; the result then lacks good rows

    Raises:
        ValueError: if the file cannot be read, or the format is to be detected and a row fits more than one
    """
    blocks = BlockTokenizer(tokenizer, reader, decide_format(name, reader))
    parts: list[Part] = []
    has_problem = False
    for block in read_blocks(name):
        parts.append(blocks.tokenize(block, only_check=has_problem and stop_at_problem))
        has_problem = has_problem or bool(parts[-1].index.problems)
    return TokenizedFile(
        name=name,
        reader=reader,
        tokens=np.concatenate([np.empty(0, TOKEN_DTYPE), *(part.tokens for part in parts)]),
        supervised=np.concatenate([np.empty(0, bool), *(part.supervised for part in parts)]),
        index=join_indices([part.index for part in parts]),
    )


@dataclass(frozen=True)
class Part:
    """The good rows of a block, concatenated, and their index."""

    tokens: np.ndarray  # [tokens of all rows] TOKEN_DTYPE
    supervised: np.ndarray  # [tokens of all rows] bool
    index: TokenIndex


@dataclass(frozen=True)
class _GoodRow:
    line: int
    conversation: Conversation
    segments: list[Segment]
    spells_special: bool

    @property
    def texts(self) -> list[str]:
        return [segment.text for segment in self.segments if not segment.is_special]


def _tokenize_rows(
    rows: Iterable[tuple[Row, Conversation | str]], tokenizer: ChatTokenizer, *, format: str, only_check: bool
) -> Part:
    good: list[_GoodRow] = []
    problems, unit = [], "line"
    for row, conversation in rows:
        unit = row.source.unit
        found = conversation
        if not isinstance(conversation, str):
            found = _render_row(row.source.line, conversation, tokenizer, only_check=only_check)
        if isinstance(found, str):
            problems.append((row.source.line, found))
        elif found is not None:
            good.append(found)
    encoded = tokenizer.encode_segments([row.segments for row in good])
    tokens = np.concatenate([np.empty(0, TOKEN_DTYPE), *(ids for ids, _ in encoded)]).astype(TOKEN_DTYPE, copy=False)
    index = _make_index(good, encoded, problems=problems, unit=unit, format=format)
    return Part(tokens, np.concatenate([np.empty(0, bool), *(flags for _, flags in encoded)]), index)


def _render_row(
    line: int, conversation: Conversation, tokenizer: ChatTokenizer, *, only_check: bool
) -> _GoodRow | str | None:
    """Return the row's segments, or its problem; None for a row that is only checked and good."""
    spelled = _find_spelled_special(conversation, tokenizer)
    if spelled is not None and conversation.text is not None:
        return f"'text' spells the special token {spelled}; give the turns as 'messages' instead"
    if only_check:
        return None
    try:
        return _GoodRow(line, conversation, _render(conversation, tokenizer), spelled is not None)
    except ValueError as error:  # the chat template cannot express it
        return str(error)


def _make_index(
    good: list[_GoodRow],
    encoded: list[tuple[np.ndarray, np.ndarray]],
    *,
    problems: list[tuple[int, str]],
    unit: str,
    format: str,
) -> TokenIndex:
    conversations = [row.conversation for row in good]
    trained = [supervised[1:] for _, supervised in encoded]  # the first token never is: nothing predicts it
    num_special = sum(segment.is_special for row in good for segment in row.segments)
    roles = ([message.role for message in one.messages] or ["text"] for one in conversations)
    system_prompts: dict[str | None, int] = {}
    system_numbers = [_number_system_prompt(one, system_prompts) for one in conversations]
    return TokenIndex(
        offsets=np.cumsum([0, *(len(ids) for ids, _ in encoded)], dtype=np.int64),
        lines=np.array([row.line for row in good], np.int64),
        num_supervised=np.array([np.count_nonzero(one) for one in trained], np.int64),
        first_supervised=np.array([int(one.argmax()) + 1 if one.any() else 0 for one in trained], np.int64),
        digests=np.frombuffer(b"".join(map(digest, conversations)), np.uint8).reshape(-1, DIGEST_BYTES),
        problems=problems,
        num_characters=sum(len(text) for row in good for text in row.texts),
        num_text_tokens=sum(len(ids) for ids, _ in encoded) - num_special,
        role_counts=dict(Counter(chain.from_iterable(roles))),
        unit=unit,
        lines_that_spell_special=[row.line for row in good if row.spells_special],
        format=format,
        absent_columns=dict(Counter(chain.from_iterable(one.absent_columns for one in conversations))),
        num_ended=sum(one.had_end for one in conversations),
        num_stripped=sum(one.was_stripped for one in conversations),
        has_tools=np.array([bool(one.tools) for one in conversations], bool),
        lines_written_otherwise=[row.line for row in good if not is_written_alike(_write_tools(row.conversation))],
        unused_keys=dict(Counter(chain.from_iterable(one.unused_keys for one in conversations))),
        system_prompts=[*system_prompts],
        system_numbers=np.array(system_numbers, np.int64),
    )


def _render(conversation: Conversation, tokenizer: ChatTokenizer) -> list[Segment]:
    if conversation.text is None:
        return tokenizer.render_conversation(conversation.messages, conversation.tools)
    return tokenizer.render_document(conversation.text)


def _number_system_prompt(conversation: Conversation, known: dict[str | None, int]) -> int:
    if conversation.text is not None:
        return RAW_TEXT
    prompt = conversation.system_prompt
    return known.setdefault(prompt, len(known))


def _find_spelled_special(conversation: Conversation, tokenizer: ChatTokenizer) -> str | None:
    texts = [message.content for message in conversation.messages]
    texts += [] if conversation.text is None else [conversation.text]
    texts.append(_write_tools(conversation))
    return next(filter(None, map(tokenizer.find_spelled_special, texts)), None)


def _write_tools(conversation: Conversation) -> str:
    """Return the definitions and calls of a conversation as text."""
    values = [conversation.tools, *(message.tool_calls for message in conversation.messages)]
    return " ".join(write_json(value) for value in values if value)


def join_indices(parts: Sequence[TokenIndex]) -> TokenIndex:
    """Return the index of a file from those of its blocks, in order."""
    starts = np.cumsum([0, *(part.offsets[-1] for part in parts)], dtype=np.int64)
    system_prompts: dict[str | None, int] = {}
    system_numbers = [_renumber_system_prompts(part, system_prompts) for part in parts]

    def concatenate(values: Iterable[np.ndarray], empty: np.ndarray) -> np.ndarray:
        return np.concatenate([empty, *values])

    def add(counts: Iterable[dict[str, int]]) -> dict[str, int]:
        total: Counter[str] = Counter()
        for one in counts:
            total.update(one)
        return dict(total)

    none = np.empty(0, np.int64)
    ends = (part.offsets[1:] + start for part, start in zip(parts, starts, strict=False))
    return TokenIndex(
        offsets=concatenate(ends, np.int64([0])),
        lines=concatenate((part.lines for part in parts), none),
        num_supervised=concatenate((part.num_supervised for part in parts), none),
        first_supervised=concatenate((part.first_supervised for part in parts), none),
        digests=concatenate((part.digests for part in parts), np.empty((0, DIGEST_BYTES), np.uint8)),
        problems=[problem for part in parts for problem in part.problems],
        num_characters=sum(part.num_characters for part in parts),
        num_text_tokens=sum(part.num_text_tokens for part in parts),
        role_counts=add(part.role_counts for part in parts),
        unit=parts[-1].unit if parts else "line",
        lines_that_spell_special=[line for part in parts for line in part.lines_that_spell_special],
        format=next((part.format for part in parts if part.format), ""),
        absent_columns=add(part.absent_columns for part in parts),
        num_ended=sum(part.num_ended for part in parts),
        num_stripped=sum(part.num_stripped for part in parts),
        has_tools=concatenate((part.has_tools for part in parts), np.empty(0, bool)),
        lines_written_otherwise=[line for part in parts for line in part.lines_written_otherwise],
        unused_keys=add(part.unused_keys for part in parts),
        system_prompts=[*system_prompts],
        system_numbers=concatenate(system_numbers, none),
    )


def _renumber_system_prompts(part: TokenIndex, known: dict[str | None, int]) -> np.ndarray:
    """Return the part's numbers in the file's list, MAX_SYSTEM_PROMPTS for prompts that no longer fit into it."""
    numbers = []
    for prompt in part.system_prompts:
        is_new = prompt not in known and len(known) < MAX_SYSTEM_PROMPTS
        numbers.append(known.setdefault(prompt, len(known)) if is_new else known.get(prompt, MAX_SYSTEM_PROMPTS))
    # RAW_TEXT, -1, indexes the last entry.
    return np.array([*numbers, RAW_TEXT], np.int64)[part.system_numbers]
