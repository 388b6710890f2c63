"""Which rows are trained on, which are for validation, which are cut and which are dropped."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from tune2gguf.data.rows import Source
from tune2gguf.data.tokenize import TokenizedFile


@dataclass(frozen=True)
class Dropped:
    """A row that is not used, and why."""

    source: Source
    reason: str
    kind: str  # bad | repeated | in both splits | nothing supervised | long


@dataclass(frozen=True)
class Truncated:
    """A row that is used up to max_seq_len."""

    source: Source
    split: str  # train | validation
    num_tokens: int  # of the whole row


@dataclass
class Selection:
    """The outcome of every row. Picks are pairs: index of the file, row in the file."""

    train: list[tuple[int, int]] = field(default_factory=list)
    validation: list[tuple[int, int]] = field(default_factory=list)
    truncated: list[Truncated] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)


def select_rows(
    files: Sequence[TokenizedFile],
    *,
    num_validation_files: int,
    validation_split: float,
    seed: int,
    max_seq_len: int,
    keep_long: bool,
) -> Selection:
    """Decide on every row.

    Args:
        files: the validation files first, so that of a row on both sides the training copy is the one to go
        num_validation_files: how many of `files` are for validation
        validation_split: the fraction of the other files' rows to hold out
        keep_long: cut rows of more than max_seq_len tokens instead of dropping them
    """
    selection = Selection()
    seen: dict[bytes, tuple[Source, str]] = {}
    for file_index, file in enumerate(files):
        index = file.index
        selection.dropped += [Dropped(file.locate(line), reason, "bad") for line, reason in index.problems]
        lengths = (index.offsets[1:] - index.offsets[:-1]).tolist()
        lines, first_supervised = index.lines.tolist(), index.first_supervised.tolist()
        for row, row_digest in enumerate(map(bytes, index.digests)):
            source = file.locate(lines[row])
            is_validation = file_index < num_validation_files or _draw(row_digest, seed) < validation_split
            split = "validation" if is_validation else "train"
            if row_digest in seen:
                selection.dropped.append(_drop_repeat(source, split, *seen[row_digest]))
                continue
            seen[row_digest] = source, split
            if lengths[row] > max_seq_len and not keep_long:
                reason = f"{lengths[row]} tokens, more than max_seq_len={max_seq_len}"
                selection.dropped.append(Dropped(source, reason, "long"))
            elif not 0 < first_supervised[row] < max_seq_len:
                reason = f"its supervised tokens begin at {first_supervised[row]}, behind max_seq_len={max_seq_len}"
                selection.dropped.append(Dropped(source, reason, "nothing supervised"))
            else:
                (selection.validation if is_validation else selection.train).append((file_index, row))
                if lengths[row] > max_seq_len:
                    selection.truncated.append(Truncated(source, split, lengths[row]))
    return selection


def _draw(row_digest: bytes, seed: int) -> float:
    """Return a number in [0, 1) that depends on the row and the seed only, not on the rows around it."""
    drawn = hashlib.blake2b(row_digest, digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(drawn, "little") / 2**64


def find_smallest_split(files: Sequence[TokenizedFile], seed: int) -> float:
    """Return the fraction, rounded up to a hundredth, from which on validation_split holds out a row."""
    smallest = min(_draw(bytes(row_digest), seed) for file in files for row_digest in file.index.digests)
    return (int(smallest * 100) + 1) / 100


def _drop_repeat(source: Source, split: str, first: Source, first_split: str) -> Dropped:
    if first_split == split:
        return Dropped(source, f"repeats {first}", "repeated")
    return Dropped(source, f"stands in both training and validation; the validation copy is {first}", "in both splits")
