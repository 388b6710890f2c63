"""The base that an adapter is merged into, and for 4-bit training the choice between its two forms.

An adapter that was trained over 4-bit weights fits the dequantized 4-bit weights exactly; the original 16-bit weights
are the better model without it. Which sum is better is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tune2gguf.base.bnb4bit import StoredNf4
from tune2gguf.base.checkpoint import BaseCheckpoint, open_base
from tune2gguf.base.layout import TensorSpec
from tune2gguf.base.safetensors_file import StoredTensor
from tune2gguf.export.merge.rows import read_gguf_rows
from tune2gguf.model.architectures import Architecture

ORIGINAL, DEQUANTIZED = "original", "dequantized"
MERGE_BASES = (ORIGINAL, DEQUANTIZED)


@dataclass(frozen=True)
class MergeBase:
    """An opened base folder; with `rounds_to_nf4` its layers' matrices are what NF4 leaves of them."""

    checkpoint: BaseCheckpoint
    rounds_to_nf4: bool = False

    @property
    def base_dir(self) -> Path:
        return self.checkpoint.base_dir

    @property
    def architecture(self) -> Architecture:
        return self.checkpoint.architecture

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return self.checkpoint.specs

    @property
    def stored(self) -> dict[str, StoredTensor | StoredNf4]:
        return self.checkpoint.stored

    @property
    def holds_nf4(self) -> bool:
        """Whether the folder itself holds 4-bit weights."""
        return any(isinstance(stored, StoredNf4) for stored in self.stored.values())

    def is_as_stored(self, name: str) -> bool:
        """Whether this tensor's rows are the numbers in the file."""
        is_rounded = self.rounds_to_nf4 and self.specs[name].is_linear
        return isinstance(self.stored[name], StoredTensor) and not is_rounded

    def read_rows(self, name: str, begin: int, end: int) -> np.ndarray:
        """Read rows [begin, end) by torchtune's name, float32, in GGUF's order; of query and key whole heads."""
        spec, stored = self.specs[name], self.stored[name]
        if isinstance(stored, StoredNf4):
            return self.checkpoint.read_rows(name, begin, end).float().numpy()
        rows = read_gguf_rows(stored, spec, begin, end)
        return rows if self.is_as_stored(name) else _round_to_nf4(rows)


def _round_to_nf4(rows: np.ndarray) -> np.ndarray:
    """What 4-bit training sees of whole rows, but for the scales, which it rounds to 8 bits on top."""
    import torch

    from tune2gguf.model.nf4 import quantize_nf4

    return quantize_nf4(torch.from_numpy(rows)).dequantize(torch.float32).numpy()


def open_merge_base(base_dir: str | Path, *, rounds_to_nf4: bool = False) -> MergeBase:
    """Open a base folder; headers only.

    Raises:
        ValueError: if it is incomplete, damaged, or rows do not hold whole 4-bit blocks where they are to be rounded
    """
    from tune2gguf.model.nf4 import BLOCK_SIZE

    base = MergeBase(open_base(base_dir), rounds_to_nf4)
    uneven = [spec.hf_name for spec in base.specs.values() if spec.is_linear and spec.shape[1] % BLOCK_SIZE]
    if rounds_to_nf4 and uneven:
        raise ValueError(f"{base_dir}: rows of {uneven[0]} do not hold whole 4-bit blocks of {BLOCK_SIZE}")
    return base
