"""Data files to batches of token ids. No row is lost silently, and rows are tokenized as they will be served.

rows: file → rows with file and line · messages: row → conversation · tokenize: conversation → token ids
select: train, validate, truncate, split or drop · ledger: the outcome of every row · prepare: all of it in one call
packing: several rows in one sequence · batches: the rows of each step, as tensors
"""

from tune2gguf.data.batches import Batch, collate, count_step_tokens, lay_out_passes, make_empty_batch, plan_epoch
from tune2gguf.data.packing import Pack
from tune2gguf.data.prepare import PreparedData, chat_dataset, check_files
from tune2gguf.data.rows import Source
from tune2gguf.data.tokenize import TokenizedRow, TokenizedRows
from tune2gguf.tokenizer.conversation import Message

__all__ = [
    "Batch",
    "Message",
    "Pack",
    "PreparedData",
    "Source",
    "TokenizedRow",
    "TokenizedRows",
    "chat_dataset",
    "check_files",
    "collate",
    "count_step_tokens",
    "lay_out_passes",
    "make_empty_batch",
    "plan_epoch",
]
