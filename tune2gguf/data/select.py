"""Row selection: which rows are trained on and how often, validated on, truncated, split or dropped."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from tune2gguf.data.messages import DIGEST_BYTES
from tune2gguf.data.rows import Source
from tune2gguf.data.tokenize import RAW_TEXT, TokenizedFile

TRAIN, VALIDATION = "train", "validation"


@dataclass(frozen=True)
class Role:
    """The source and the split of a file."""

    source: int  # index of its source
    is_validation: bool
    validation_split: float  # fraction of its rows to hold out; 0 for a validation file


@dataclass(frozen=True)
class Share:
    """A source's share of an epoch: `weight` times each training row, or `rows` rows in all."""

    weight: float = 1.0
    rows: int | None = None


@dataclass(frozen=True)
class Dropped:
    """A row that is not used, and why."""

    source: Source
    reason: str
    kind: str  # bad | repeated | in both splits | nothing supervised | long


@dataclass(frozen=True)
class Truncated:
    """A row that is cut to max_seq_len."""

    source: Source
    split: str  # train | validation
    num_tokens: int  # of the whole row


@dataclass(frozen=True)
class Pieces:
    """A raw text that is split into pieces of max_seq_len."""

    source: Source
    split: str  # train | validation
    num_tokens: int  # of the whole row
    num_pieces: int


@dataclass
class Selection:
    """The outcome of every row.

    Attributes:
        train, validation: [picks, 3] int64, as in TokenizedRows; a row that an epoch takes twice is twice in `train`
        not_drawn: index of a file -> indices of its rows that the share of its source leaves out
    """

    train: np.ndarray
    validation: np.ndarray
    truncated: list[Truncated] = field(default_factory=list)
    pieces: list[Pieces] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    not_drawn: dict[int, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """The length limit and the treatment of longer rows.

    Attributes:
        on_long_row: truncate | split | drop; split cuts raw texts into pieces, and truncates conversations
        overlap: tokens that a piece repeats from the piece before
    """

    max_seq_len: int
    on_long_row: str
    overlap: int = 1


def select_rows(
    files: Sequence[TokenizedFile], roles: Sequence[Role], shares: Sequence[Share], *, seed: int, limits: Limits
) -> Selection:
    """Select every row for training or validation, or drop it.

    Args:
        files: validation files first: of a row in both splits, the later, training copy is dropped
        roles: one per file
        shares: one per source
    """
    firsts = _find_first_copies(files)
    selection = Selection(np.empty((0, 3), np.int64), np.empty((0, 3), np.int64))
    sides = [_draw_validation(file, role, seed) for file, role in zip(files, roles, strict=True)]
    kept = []
    for number, file in enumerate(files):
        selection.dropped += [Dropped(file.locate(line), reason, "bad") for line, reason in file.index.problems]
        lengths = np.diff(file.index.offsets)
        is_first = np.ones(len(lengths), bool)
        reasons = {}
        for row, copy_of in firsts[number].items():
            is_first[row] = False
            reasons[row] = _describe_repeat(file, row, sides[number][row], files, sides, copy_of)
        is_good = is_first & _find_trainable(file, lengths, limits, reasons)
        selection.dropped += [
            Dropped(file.locate(int(file.index.lines[row])), reason, kind)
            for row, (reason, kind) in sorted(reasons.items())
        ]
        kept.append(is_good)
    validation = [np.flatnonzero(good & side) for good, side in zip(kept, sides, strict=True)]
    train = [np.flatnonzero(good & ~side) for good, side in zip(kept, sides, strict=True)]
    times = _draw_shares(files, roles, shares, train, seed)
    for number, counts in enumerate(times):
        if not counts.all():
            selection.not_drawn[number] = train[number][counts == 0]
    used = [rows[counts > 0] for rows, counts in zip(train, times, strict=True)]
    for number, file in enumerate(files):
        _note_long_rows(file, {TRAIN: used[number], VALIDATION: validation[number]}, limits, selection)
    repeated = [np.repeat(rows, counts) for rows, counts in zip(train, times, strict=True)]
    selection.train = _pick(files, repeated, limits)
    selection.validation = _pick(files, validation, limits)
    return selection


def _find_first_copies(files: Sequence[TokenizedFile]) -> list[dict[int, tuple[int, int]]]:
    """Return, per file, the index of each repeated row -> file and row index of its first copy."""
    sizes = [len(file.index.lines) for file in files]
    digests = np.concatenate([np.empty((0, DIGEST_BYTES), np.uint8), *(file.index.digests for file in files)])
    keys = np.ascontiguousarray(digests).view(np.dtype((np.void, DIGEST_BYTES))).reshape(-1)
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    first_of = first[inverse]
    starts = np.cumsum([0, *sizes])
    found: list[dict[int, tuple[int, int]]] = [{} for _ in files]
    for place in np.flatnonzero(first_of != np.arange(len(keys))).tolist():
        file, copy = (int(np.searchsorted(starts, at, side="right")) - 1 for at in (place, first_of[place]))
        found[file][place - int(starts[file])] = copy, int(first_of[place] - starts[copy])
    return found


def _draw_validation(file: TokenizedFile, role: Role, seed: int) -> np.ndarray:
    """Return the validation mask of a file's rows, [rows] bool."""
    if role.is_validation or role.validation_split == 0:
        return np.full(len(file.index.lines), role.is_validation)
    return _draw(file, seed) < role.validation_split


def _draw(file: TokenizedFile, seed: int, purpose: bytes = b"") -> np.ndarray:
    """Return a number in [0, 1) per row. It depends only on the row's content, the seed and the purpose."""
    key = seed.to_bytes(8, "little")
    raw = np.ascontiguousarray(file.index.digests).tobytes()
    drawn = b"".join(
        hashlib.blake2b(raw[start : start + DIGEST_BYTES], digest_size=8, key=key, person=purpose).digest()
        for start in range(0, len(raw), DIGEST_BYTES)
    )
    return np.frombuffer(drawn, "<u8") / 2**64


def _describe_repeat(
    file: TokenizedFile,
    row: int,
    is_validation: bool,
    files: Sequence[TokenizedFile],
    sides: Sequence[np.ndarray],
    copy_of: tuple[int, int],
) -> tuple[str, str]:
    other, other_row = copy_of
    first = files[other].locate(int(files[other].index.lines[other_row]))
    if sides[other][other_row] == is_validation:
        return f"repeats {first}", "repeated"
    return f"is in both training and validation; the validation copy is {first}", "in both splits"


def _find_trainable(
    file: TokenizedFile, lengths: np.ndarray, limits: Limits, reasons: dict[int, tuple[str, str]]
) -> np.ndarray:
    """Return the mask of rows with supervised tokens within max_seq_len; add the others to `reasons`."""
    first, limit = file.index.first_supervised, limits.max_seq_len
    is_whole = limits.on_long_row == "split"
    is_too_long = (lengths > limit) & (limits.on_long_row == "drop")
    is_beyond = ~((first > 0) & ((first < limit) | (is_whole & (file.index.system_numbers == RAW_TEXT))))
    for row in np.flatnonzero(is_too_long | is_beyond).tolist():
        if row in reasons:
            continue
        if is_too_long[row]:
            reasons[row] = f"{lengths[row]} tokens, more than max_seq_len={limit}", "long"
        else:
            reason = f"its supervised tokens begin after {first[row]} tokens, beyond max_seq_len={limit}"
            reasons[row] = reason, "nothing supervised"
    return ~(is_too_long | is_beyond)


def _draw_shares(
    files: Sequence[TokenizedFile],
    roles: Sequence[Role],
    shares: Sequence[Share],
    train: Sequence[np.ndarray],
    seed: int,
) -> list[np.ndarray]:
    """Return how often an epoch takes each training row, per file.

    Each row is taken floor(weight) times. The remainder goes to the rows with the lowest draws: the same rows in every
    epoch, and mostly the same after rows are added.
    """
    times = [np.ones(len(rows), np.int64) for rows in train]
    for number, share in enumerate(shares):
        own = [file for file, role in enumerate(roles) if role.source == number and len(train[file])]
        available = sum(len(train[file]) for file in own)
        wanted = round(share.weight * available) if share.rows is None else share.rows
        if available == 0 or wanted == available:
            continue
        draws = np.concatenate([_draw(files[file], seed, b"share")[train[file]] for file in own])
        counts = np.full(available, wanted // available)
        counts[np.argsort(draws, kind="stable")[: wanted % available]] += 1
        ends = np.cumsum([len(train[file]) for file in own])[:-1]
        for file, part in zip(own, np.split(counts, ends), strict=True):
            times[file] = part
    return times


def _note_long_rows(
    file: TokenizedFile, rows_by_split: dict[str, np.ndarray], limits: Limits, selection: Selection
) -> None:
    for split, rows in rows_by_split.items():
        lengths = np.diff(file.index.offsets)[rows]
        for row, length in zip(
            rows[lengths > limits.max_seq_len].tolist(), lengths[lengths > limits.max_seq_len].tolist(), strict=True
        ):
            source = file.locate(int(file.index.lines[row]))
            if _is_split(file, row, limits):
                pieces = len(range(0, length - limits.overlap, limits.max_seq_len - limits.overlap))
                selection.pieces.append(Pieces(source, split, length, pieces))
            else:
                selection.truncated.append(Truncated(source, split, length))


def _is_split(file: TokenizedFile, row: int, limits: Limits) -> bool:
    return limits.on_long_row == "split" and file.index.system_numbers[row] == RAW_TEXT


def _pick(files: Sequence[TokenizedFile], rows_by_file: Sequence[np.ndarray], limits: Limits) -> np.ndarray:
    """Return the picks of the rows, [picks, 3] int64: one per row, or one per piece of a text that is split."""
    picks = [np.empty((0, 3), np.int64)]
    for number, (file, rows) in enumerate(zip(files, rows_by_file, strict=True)):
        firsts = [*_start_pieces(file, rows, limits)]
        counts = [len(starts) for starts in firsts] if firsts else np.ones(len(rows), np.int64)
        picked = np.repeat(rows, counts)
        starts = np.concatenate(firsts) if firsts else np.zeros(len(rows), np.int64)
        picks.append(np.stack([np.full(len(picked), number), picked, starts], axis=1))
    return np.concatenate(picks)


def _start_pieces(file: TokenizedFile, rows: np.ndarray, limits: Limits) -> Iterator[np.ndarray]:
    """Yield the first tokens of each row's pieces; nothing if no row is split."""
    lengths = np.diff(file.index.offsets)[rows]
    is_split = (lengths > limits.max_seq_len) & (file.index.system_numbers[rows] == RAW_TEXT)
    if limits.on_long_row != "split" or not is_split.any():
        return
    stride = limits.max_seq_len - limits.overlap
    for length, has_pieces in zip(lengths.tolist(), is_split.tolist(), strict=True):
        yield np.arange(0, length - limits.overlap, stride) if has_pieces else np.zeros(1, np.int64)


def find_smallest_split(files: Sequence[TokenizedFile], seed: int) -> float:
    """Return the smallest validation_split that holds out a row, rounded up to a hundredth."""
    smallest = min(_draw(file, seed).min() for file in files if len(file.index.lines))
    return (int(smallest * 100) + 1) / 100
