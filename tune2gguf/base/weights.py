"""A check of a base's weights for non-finite values; it reads all of them, so it runs only after a non-finite loss."""

from __future__ import annotations

from pathlib import Path

from tune2gguf.base.checkpoint import open_base


def describe_weights(base_dir: str | Path) -> str:
    """Return one sentence: the first tensor with non-finite values, or the tensor with the largest value."""
    base = open_base(base_dir)
    largest, where = -1.0, ""
    for name, spec in base.specs.items():
        weight = base.read_tensor(name).float()
        num_wrong = int((~weight.isfinite()).sum())
        if num_wrong:
            values = "1 non-finite value" if num_wrong == 1 else f"{num_wrong} non-finite values"
            return f"{spec.hf_name} has {values}"
        largest, where = max((largest, where), (float(weight.abs().max()), spec.hf_name))
    return f"all weights are finite; the largest, {largest:.3g}, is in {where}"
