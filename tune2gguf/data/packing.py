"""Packing: several rows in one sequence of max_seq_len, without attention between rows."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tune2gguf.data.tokenize import TokenizedRow, TokenizedRows


@dataclass(frozen=True)
class Pack:
    """Rows that share a sequence. It is counted and collated like one long TokenizedRow."""

    rows: tuple[TokenizedRow, ...]

    @property
    def row_lengths(self) -> list[int]:
        return [len(row.tokens) for row in self.rows]

    @property
    def tokens(self) -> np.ndarray:
        """[seq] int32"""
        return np.concatenate([row.tokens for row in self.rows])

    @property
    def supervised(self) -> np.ndarray:
        """[seq] bool. A row's first token is never supervised: the row before must not predict it."""
        flags = np.concatenate([row.supervised for row in self.rows])
        flags[np.cumsum([0, *self.row_lengths[:-1]])] = False
        return flags

    @property
    def num_supervised(self) -> int:
        return sum(row.num_supervised for row in self.rows)

    @property
    def source(self) -> str:
        return " + ".join(str(row.source) for row in self.rows)


@dataclass(frozen=True)
class PackedRows(Sequence[Pack]):
    """Rows in packs: `packs[i]` holds the row indices of pack i."""

    rows: TokenizedRows
    packs: list[list[int]]

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> Pack:
        return Pack(tuple(self.rows[row] for row in self.packs[index]))

    @cached_property
    def fill(self) -> float:
        """The filled share of max_seq_len, over all packs except the least filled one."""
        lengths = self.rows.lengths()
        filled = sorted(int(lengths[pack].sum()) for pack in self.packs)[1:]
        return sum(filled) / (len(filled) * self.rows.max_seq_len) if filled else 1.0


def pack_rows(rows: TokenizedRows, *, seed: int) -> PackedRows:
    """Put every row into a pack of at most max_seq_len tokens. All epochs of a run have the same packs.

    Best fit decreasing: longest row first, each into the fullest pack with room. The seed orders rows of equal length.
    """
    lengths = rows.lengths()
    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    by_length = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    packs: list[list[int]] = []
    packs_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of packs_by_room, in order
    for row, length in zip(by_length.tolist(), lengths[by_length].tolist(), strict=True):
        position = bisect_left(rooms, length)
        if position == len(rooms):
            room, pack = rows.max_seq_len, len(packs)
            packs.append([])
        else:
            room = rooms[position]
            pack = packs_by_room[room].pop()
            if not packs_by_room[room]:
                del packs_by_room[room], rooms[position]
        packs[pack].append(row)
        left = room - length
        if left not in packs_by_room:
            packs_by_room[left] = []
            insort(rooms, left)
        packs_by_room[left].append(pack)
    return PackedRows(rows, packs)


def list_rows(sequence: TokenizedRow | Pack) -> Sequence[TokenizedRow]:
    """Return the rows of a pack, or the row itself."""
    return sequence.rows if isinstance(sequence, Pack) else (sequence,)
