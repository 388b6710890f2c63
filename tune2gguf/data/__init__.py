"""Rows of data files to batches of token ids: no row lost in silence, and what is trained is what will be served.

rows: files → rows with file and line · messages: row → conversation · tokenize: conversation → ids, supervised flags
select: which row goes where · ledger: what became of every row · prepare: all of it in one call
packing: several rows in one sequence · batches: which rows a step takes, and the tensors they become
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
