"""Data summary: figures of a data set before training, as a run would read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tune2gguf.data.packing import pack_rows
from tune2gguf.data.prepare import PreparedData, chat_dataset

if TYPE_CHECKING:
    from tune2gguf.tokenizer.tokenizer import ChatTokenizer

KEPT_SHARES = (1.0, 0.99, 0.95)


@dataclass(frozen=True)
class DataSummary:
    """The figures of a data set, and its rows.

    Attributes:
        shapes: file -> format of its rows, "" if no row fits one
        mappings: file -> its column mapping as text, "" without any
        roles: role -> number of messages
        lengths: tokens of every good row before truncation, validation rows included, [rows]
        max_seq_lens: share of the rows -> the max_seq_len that keeps this share whole
        characters_per_token: of the text between special tokens
        dropped: kind -> number of rows
        num_steps: rows | packs -> steps per epoch
        fill: filled share of the packs
    """

    data: PreparedData
    max_seq_len: int
    rows_per_step: int
    shapes: dict[str, str]
    mappings: dict[str, str]
    roles: dict[str, int]
    lengths: np.ndarray
    max_seq_lens: dict[float, int]
    characters_per_token: float
    dropped: dict[str, int]
    num_steps: dict[str, int]
    fill: float

    @property
    def supervised_share(self) -> float:
        training = self.data.ledger["training"]
        return training["supervised_tokens"] / training["tokens"]


def summarize_data(
    dataset: Mapping[str, Any],
    *,
    tokenizer: ChatTokenizer,
    max_seq_len: int,
    seed: int,
    batch_size: int,
    accumulation_steps: int,
) -> DataSummary:
    """Read a data set as a run would, but count bad rows instead of raising.

    Args:
        dataset: the options of chat_dataset
    """
    on_long_row = "split" if dataset.get("on_long_row") == "split" else "truncate"
    options = {**dataset, "on_bad_row": "drop", "on_long_row": on_long_row, "packing": False}
    data = chat_dataset(**options, tokenizer=tokenizer, max_seq_len=max_seq_len, seed=seed)
    indices = [file.index for file in data.train.files]
    lengths = np.concatenate([np.diff(index.offsets) for index in indices])
    packed, rows_per_step = pack_rows(data.train, seed=seed), batch_size * accumulation_steps
    return DataSummary(
        data=data,
        max_seq_len=max_seq_len,
        rows_per_step=rows_per_step,
        shapes={file.name: file.index.format for file in data.train.files},
        mappings={file.name: file.reader.describe() for file in data.train.files},
        roles=dict(sum((Counter(index.role_counts) for index in indices), Counter())),
        lengths=lengths,
        max_seq_lens={share: int(np.quantile(lengths, share, method="higher")) for share in KEPT_SHARES},
        characters_per_token=sum(index.num_characters for index in indices)
        / sum(index.num_text_tokens for index in indices),
        dropped=dict(Counter(row["kind"] for row in data.ledger["rows_dropped"])),
        num_steps={
            "rows": -(-len(data.train) // rows_per_step),
            "packs": -(-len(packed) // rows_per_step),
        },
        fill=packed.fill,
    )
