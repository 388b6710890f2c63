"""Components for torchtune's recipe in train.py: tokenized rows, and a constant learning rate."""

from __future__ import annotations

import json
from pathlib import Path

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset


class PlannedRows(Dataset):
    """The rows of all batches in order. With shuffle=False the recipe takes the same batches as ours."""

    def __init__(self, tokenizer: object, path: str, packed: bool = False) -> None:
        self.rows = [row for batch in json.loads(Path(path).read_text()) for row in batch]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


def get_constant_schedule(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, last_epoch: int = -1
) -> LambdaLR:
    """Return a constant schedule. The recipe passes these arguments."""
    return LambdaLR(optimizer, lambda step: 1.0, last_epoch)


def load_tokenizer(path: str, max_seq_len: int | None = None) -> object:
    """Return our tokenizer of the quickstart's base: torchtune has none, and the recipe needs its pad_id."""
    from tune2gguf.tokenizer.tokenizer import load_tokenizer

    return load_tokenizer(path, chat_template="chatml")
