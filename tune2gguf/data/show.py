"""A data summary as text for the terminal: figures, a histogram, and rows with the supervised tokens coloured."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from tune2gguf.data.ledger import RowLedger, locate_row
from tune2gguf.data.summary import DataSummary
from tune2gguf.data.tokenize import TokenizedRow
from tune2gguf.tokenizer.tokenizer import ChatTokenizer

NUM_BINS = 16
BAR_WIDTH = 48
MAX_PROBLEMS_SHOWN = 10
SUPERVISED, PLAIN, END = "\033[32m", "\033[2m", "\033[0m"  # green, dim, back to normal
MARKS = ("⟦", "⟧")


class Bin(NamedTuple):
    """The number of rows with start <= tokens < stop. A last bin for longer rows has no stop."""

    start: int
    stop: int | None
    count: int


def make_histogram(lengths: np.ndarray, num_bins: int = NUM_BINS) -> list[Bin]:
    """Return bins of equal, round width up to the 99th percentile, and one for longer rows."""
    width = max(1, -(-int(np.quantile(lengths, 0.99)) // num_bins))
    unit = 10 ** max(0, len(str(width)) - 2)
    width = -(-width // unit) * unit
    edges = np.arange(num_bins + 1) * width
    counts, _ = np.histogram(lengths[lengths < edges[-1]], edges)
    bins = [Bin(int(edges[index]), int(edges[index + 1]), int(count)) for index, count in enumerate(counts)]
    num_longer = int((lengths >= edges[-1]).sum())
    return bins + ([Bin(int(edges[-1]), None, num_longer)] if num_longer else [])


def format_summary(summary: DataSummary) -> str:
    """Return the figures of a data set as lines of text."""
    return "\n".join([*_format_rows(summary), *_format_lengths(summary), *_format_epochs(summary)])


def _format_rows(summary: DataSummary) -> Iterator[str]:
    ledger = summary.data.ledger
    for file in ledger["files"]:
        shape = summary.shapes[file["file"]] or "no format detected"
        revision = f", revision {file['revision']}" if file["revision"] else ""
        yield f"{escape(file['file'])}: {file['read']} rows, {shape}{revision}"
        mapping = summary.mappings[file["file"]]
        if mapping:
            yield f"  {escape(mapping)}"
    not_drawn = f" + {ledger['not_drawn']} not drawn" if ledger["not_drawn"] else ""
    yield (
        f"rows: {ledger['read']} read = {ledger['trained']} trained + {ledger['validated']} validated"
        f" + {ledger['truncated']} truncated + {ledger['dropped']} dropped{not_drawn}"
    )
    yield from _format_sources(ledger)
    yield f"messages: {', '.join(f'{count} {role}' for role, count in summary.roles.items())}"
    if ledger["rows_with_tools"]:
        yield f"rows with tools: {ledger['rows_with_tools']} of {ledger['training']['rows']} training rows"
    if summary.dropped:
        yield f"dropped: {', '.join(f'{count} {kind}' for kind, count in summary.dropped.items())}"
    for row in ledger["rows_dropped"][:MAX_PROBLEMS_SHOWN]:
        yield f"  {escape(locate_row(ledger, row))}: {escape(row['reason'])}"
    if ledger["dropped"] > MAX_PROBLEMS_SHOWN:
        yield f"  and {ledger['dropped'] - MAX_PROBLEMS_SHOWN} more"


def _format_sources(ledger: RowLedger) -> Iterator[str]:
    """Yield each source's share of an epoch if there are several sources."""
    if len(ledger["sources"]) == 1:
        return
    total = ledger["training"]["tokens"]
    for number, source in enumerate(ledger["sources"]):
        yield (
            f"source {number}, {escape(', '.join(source['files']))}: {source['read']} read, {source['trained']} trained"
            f", {source['validated']} validated; an epoch takes {source['rows_per_epoch']} rows, "
            f"{source['tokens_per_epoch'] / total:.1%} of its tokens"
        )


def _format_lengths(summary: DataSummary) -> Iterator[str]:
    p50, p95 = np.quantile(summary.lengths, [0.5, 0.95], method="higher")
    yield ""
    yield f"tokens per row: median {p50}, 95th percentile {p95}, longest {summary.lengths.max()}"
    bins = make_histogram(summary.lengths)
    largest, width = max(entry.count for entry in bins), len(str(bins[-1].stop or bins[-1].start))
    for entry in bins:
        label = f"{entry.start:>{width}} – {entry.stop - 1:<{width}}" if entry.stop else f"{entry.start:>{width}} –"
        bar = "█" * -(-entry.count * BAR_WIDTH // largest)
        limit = " ◄ max_seq_len" if entry.start <= summary.max_seq_len < (entry.stop or np.inf) else ""
        yield f"  {label:<{2 * width + 3}} {bar} {entry.count}{limit}"
    num_split = len(summary.data.ledger["rows_split"])
    num_cut = (summary.lengths > summary.max_seq_len).sum() - num_split
    split = f" and splits {num_split} texts" if num_split else ""
    yield f"max_seq_len={summary.max_seq_len} cuts {num_cut} rows{split};" + ",".join(
        f" {length} keeps {share:.0%} whole" for share, length in summary.max_seq_lens.items()
    )
    yield f"supervised: {summary.supervised_share:.1%} of the training tokens"
    yield f"characters per token: {summary.characters_per_token:.2f}"


def _format_epochs(summary: DataSummary) -> Iterator[str]:
    yield ""
    yield f"an epoch at {summary.rows_per_step} rows, or packs of {summary.max_seq_len} tokens, per step:"
    steps = summary.num_steps
    yield f"  rows: {steps['rows']} steps; packs: {steps['packs']} steps, {summary.fill:.1%} full; no padding"
    for note in summary.data.ledger["notes"]:
        yield f"note: {escape(note)}"


def split_runs(row: TokenizedRow, tokenizer: ChatTokenizer) -> list[tuple[str, bool]]:
    """Return a row's text in runs of (text, is supervised). A run is decoded whole, because characters span tokens."""
    edges = [0, *(np.flatnonzero(np.diff(row.supervised)) + 1).tolist(), len(row.tokens)]
    return [
        (tokenizer.decode(row.tokens[start:stop].tolist()), bool(row.supervised[start]))
        for start, stop in pairwise(edges)
        if start < stop
    ]


def describe_row(row: TokenizedRow) -> str:
    return f"{row.source}: {len(row.tokens)} tokens, {row.num_supervised} supervised"


def format_row(row: TokenizedRow, tokenizer: ChatTokenizer, *, colored: bool) -> str:
    """Return a row's text, with supervised tokens in green, or between ⟦ and ⟧ without colours."""
    marks = {True: (SUPERVISED, END), False: (PLAIN, END)} if colored else {True: MARKS, False: ("", "")}
    pieces = [escape(text).join(marks[supervised]) for text, supervised in split_runs(row, tokenizer)]
    return f"── {escape(describe_row(row))}\n{''.join(pieces)}"


def escape(text: str) -> str:
    """Escape control characters except line breaks and tabs: data must not control the terminal."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else repr(character)[1:-1] for character in text
    )
