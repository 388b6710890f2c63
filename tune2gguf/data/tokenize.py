"""A data file to token ids: every row read, checked, rendered and tokenized once, whatever is later made of it."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from tune2gguf.data.messages import DIGEST_BYTES, AmbiguousFormatError, detect_format, digest, read_conversation
from tune2gguf.data.rows import MAX_ROW_BYTES, Row, Source, describe_too_long, read_rows
from tune2gguf.tokenizer.conversation import Conversation
from tune2gguf.tokenizer.tools import is_written_alike, write_json

if TYPE_CHECKING:
    from tune2gguf.tokenizer.tokenizer import ChatTokenizer, Segment

# Rows are tokenized together up to so many characters: enough to keep all cores busy, little enough to stay small.
CHUNK_CHARACTERS = 2**20
TOKEN_DTYPE = np.dtype("<i4")
# Data sets that put a text of its own into each system message shall not be held in memory for it.
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
        """The number of positions that are trained; the first token never is, as nothing predicts it."""
        return int(np.count_nonzero(self.supervised[1:]))


@dataclass(frozen=True)
class TokenIndex:
    """Where the good rows of a file stand among its tokens, and what is wrong with the others.

    Row i has the tokens from offsets[i] up to offsets[i + 1].
    """

    offsets: np.ndarray  # [rows + 1] int64
    lines: np.ndarray  # [rows] int64, as in Source
    num_supervised: np.ndarray  # [rows] int64, trained positions
    first_supervised: np.ndarray  # [rows] int64, the first trained position in the row
    digests: np.ndarray  # [rows, DIGEST_BYTES] uint8
    problems: list[tuple[int, str]]  # line and reason
    num_characters: int  # of the good rows' text, special tokens not counted
    num_text_tokens: int  # of the good rows, special tokens not counted
    role_counts: dict[str, int]  # messages of the good rows; raw texts count as "text"
    unit: str  # of lines, as in Source
    lines_that_spell_special: list[int]  # special tokens in content are trained as text, but served as special tokens
    num_ended: int  # good rows of which an end-of-turn token was taken off
    num_stripped: int  # good rows of which white space around a content was taken off
    has_tools: np.ndarray  # [rows] bool, whether the row defines tools
    lines_written_otherwise: list[int]  # tools or calls hold characters that Ollama's template escapes
    unused_keys: dict[str, int]  # good rows that have something under a key that is not used
    system_prompts: list[str | None]  # of the good conversations, each once; None: one without
    system_numbers: np.ndarray  # [rows] int64, which of them; their number: another one; RAW_TEXT: none is possible

    @property
    def num_read(self) -> int:
        return len(self.lines) + len(self.problems)


@dataclass(frozen=True)
class TokenizedFile:
    """The good rows of one file, end to end, and their index."""

    name: str
    tokens: np.ndarray  # [tokens of all rows] int32
    supervised: np.ndarray  # [tokens of all rows] bool
    index: TokenIndex

    def locate(self, line: int) -> Source:
        """Return where a line, or row, of the file stands."""
        return Source(self.name, line, self.index.unit)


@dataclass(frozen=True)
class TokenizedRows(Sequence[TokenizedRow]):
    """Rows chosen from tokenized files, each cut to max_seq_len when it is looked at; holds no tokens of its own."""

    files: list[TokenizedFile]
    picks: np.ndarray  # [rows, 2] int64: index into files, row in the file
    max_seq_len: int

    def __len__(self) -> int:
        return len(self.picks)

    def __getitem__(self, index: int) -> TokenizedRow:
        file_index, row = self.picks[index]
        file = self.files[file_index]
        start, end = file.index.offsets[row : row + 2]
        stop = min(end, start + self.max_seq_len)
        return TokenizedRow(
            tokens=file.tokens[start:stop],
            supervised=file.supervised[start:stop],
            source=file.locate(int(file.index.lines[row])),
        )

    def take(self, rows: Sequence[int]) -> TokenizedRows:
        """Return these rows alone, in this order."""
        return TokenizedRows(self.files, self.picks[np.asarray(rows, np.int64)], self.max_seq_len)

    def digests(self) -> list[bytes]:
        """Return the digest of each row's content; as rows are no more than once in a run, no two are equal."""
        return [bytes(self.files[file].index.digests[row]) for file, row in self.picks]

    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each row, [rows] int64."""
        return np.minimum(self._collect(lambda index: np.diff(index.offsets)), self.max_seq_len)

    def supervised_lengths(self) -> np.ndarray:
        """Return the number of trained positions of each row, [rows] int64."""
        counts = self._collect(lambda index: index.num_supervised)
        for row in np.flatnonzero(self.lengths() == self.max_seq_len).tolist():
            counts[row] = self[row].num_supervised
        return counts

    def _collect(self, get_values: Callable[[TokenIndex], np.ndarray]) -> np.ndarray:
        values = np.zeros(len(self.picks), np.int64)
        for number, file in enumerate(self.files):
            chosen = self.picks[:, 0] == number
            values[chosen] = get_values(file.index)[self.picks[chosen, 1]]
        return values


def read_conversations(name: str, *, format: str) -> Iterator[tuple[Row, Conversation | str]]:
    """Yield each row of a file with its conversation, or with what is wrong with it.

    With format "auto" the first row that fits a format decides, and a row of another shape is a problem.

    Raises:
        ValueError: if the format is to be detected and a row fits more than one
    """
    decided = None if format == "auto" else format
    decided_by = ""
    for row in read_rows(name):
        if row.problem is not None:
            yield row, row.problem
            continue
        try:
            if format == "auto":
                found = detect_format(row.value)
                if decided is None:
                    decided, decided_by = found, f"{row.source.unit} {row.source.line}"
                elif found != decided:
                    raise ValueError(f"its shape is {found}, but the file's is {decided} since {decided_by}")
            conversation: Conversation | str = read_conversation(row.value, format=decided)
            _check_size(conversation)
        except AmbiguousFormatError as error:
            raise ValueError(f"{row.source}: {error}") from None
        except ValueError as error:
            conversation = str(error)
        yield row, conversation


def _check_size(conversation: Conversation) -> None:
    """Hold rows of files without lines to the limit of a line, too."""
    num_characters = sum(len(message.content) for message in conversation.messages) + len(conversation.text or "")
    if num_characters > MAX_ROW_BYTES:
        raise ValueError(describe_too_long(num_characters))


def tokenize_file(name: str, tokenizer: ChatTokenizer, *, format: str, stop_at_problem: bool) -> TokenizedFile:
    """Read and tokenize one file that rows.find_files returned, in memory.

    Args:
        stop_at_problem: after the first bad row only look for more of them; the result then lacks rows
    """
    tokens, supervised = io.BytesIO(), io.BytesIO()
    writer = TokenWriter(tokenizer, tokens, supervised)
    index = write_tokens(read_conversations(name, format=format), writer, stop_at_problem=stop_at_problem)
    return TokenizedFile(
        name=name,
        tokens=np.frombuffer(tokens.getbuffer(), TOKEN_DTYPE),
        supervised=np.frombuffer(supervised.getbuffer(), bool),
        index=index,
    )


def write_tokens(
    rows: Iterable[tuple[Row, Conversation | str]], writer: TokenWriter, *, stop_at_problem: bool
) -> TokenIndex:
    """Write the good rows' tokens and return the index of all rows."""
    lines, digests, problems, spelling = [], [], [], []
    unit, role_counts, unused_keys = "line", Counter(), Counter()
    system_prompts: dict[str | None, int] = {}
    system_numbers, num_ended, num_stripped = [], 0, 0
    has_tools: list[bool] = []
    written_otherwise: list[int] = []
    for row, conversation in rows:
        line, unit = row.source.line, row.source.unit
        spelled = None if isinstance(conversation, str) else _find_spelled_special(conversation, writer.tokenizer)
        if spelled is not None and conversation.text is not None:
            conversation = f"'text' spells the special token {spelled}; give the turns as 'messages' instead"
        if isinstance(conversation, str):
            problems.append((line, conversation))
        elif not (problems and stop_at_problem):
            try:
                writer.add(conversation)
            except ValueError as error:  # the format has no place for it
                problems.append((line, str(error)))
                continue
            has_tools.append(bool(conversation.tools))
            if not is_written_alike(_write_tools(conversation)):
                written_otherwise.append(line)
            lines.append(line)
            digests.append(digest(conversation))
            role_counts.update([message.role for message in conversation.messages] or ["text"])
            unused_keys.update(conversation.unused_keys)
            num_ended += conversation.had_end
            num_stripped += conversation.was_stripped
            system_numbers.append(_number_system_prompt(conversation, system_prompts))
            if spelled is not None:
                spelling.append(line)
    writer.flush()
    return TokenIndex(
        offsets=np.cumsum([0, *writer.lengths], dtype=np.int64),
        lines=np.array(lines, np.int64),
        num_supervised=np.array(writer.num_supervised, np.int64),
        first_supervised=np.array(writer.first_supervised, np.int64),
        digests=np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST_BYTES),
        problems=problems,
        num_characters=writer.num_characters,
        num_text_tokens=writer.num_text_tokens,
        role_counts=dict(role_counts),
        unit=unit,
        lines_that_spell_special=spelling,
        num_ended=num_ended,
        num_stripped=num_stripped,
        has_tools=np.array(has_tools, bool),
        lines_written_otherwise=written_otherwise,
        unused_keys=dict(unused_keys),
        system_prompts=[*system_prompts],
        system_numbers=np.array(system_numbers, np.int64),
    )


def _number_system_prompt(conversation: Conversation, known: dict[str | None, int]) -> int:
    if conversation.text is not None:
        return RAW_TEXT
    prompt = conversation.system_prompt
    if prompt not in known and len(known) == MAX_SYSTEM_PROMPTS:
        return MAX_SYSTEM_PROMPTS
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


class TokenWriter:
    """Tokenizes conversations in chunks and appends them to two files, ids as TOKEN_DTYPE and flags as a byte each."""

    def __init__(self, tokenizer: ChatTokenizer, tokens_file: BinaryIO, supervised_file: BinaryIO) -> None:
        self.tokenizer = tokenizer
        self.tokens_file, self.supervised_file = tokens_file, supervised_file
        self.lengths: list[int] = []
        self.num_supervised: list[int] = []
        self.first_supervised: list[int] = []  # 0 where nothing is
        self.num_characters = self.num_text_tokens = 0
        self._waiting: list[list[Segment]] = []
        self._waiting_characters = 0

    def add(self, conversation: Conversation) -> None:
        if conversation.text is None:
            segments = self.tokenizer.render_conversation(conversation.messages, conversation.tools)
        else:
            segments = self.tokenizer.render_document(conversation.text)
        self._waiting.append(segments)
        self._waiting_characters += sum(len(segment.text) for segment in segments if not segment.is_special)
        if self._waiting_characters >= CHUNK_CHARACTERS:
            self.flush()

    def flush(self) -> None:
        for segments, (tokens, supervised) in zip(
            self._waiting, self.tokenizer.encode_segments(self._waiting), strict=True
        ):
            self.num_text_tokens += len(tokens) - sum(segment.is_special for segment in segments)
            self.tokens_file.write(tokens.astype(TOKEN_DTYPE, copy=False).tobytes())
            self.supervised_file.write(supervised.tobytes())
            # The first token is never trained: nothing predicts it.
            trained = supervised[1:]
            self.lengths.append(len(tokens))
            self.num_supervised.append(int(np.count_nonzero(trained)))
            self.first_supervised.append(int(trained.argmax()) + 1 if trained.any() else 0)
        self.num_characters += self._waiting_characters
        self._waiting, self._waiting_characters = [], 0
