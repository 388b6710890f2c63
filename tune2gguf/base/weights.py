"""Whether a base's weights are numbers: asked when a loss is not finite, because it reads all of them."""

from __future__ import annotations

from pathlib import Path

from tune2gguf.base.checkpoint import open_base


def describe_weights(base_dir: str | Path) -> str:
    """Return in one sentence which tensor holds values that are not finite; of a sound base, which has the largest."""
    base = open_base(base_dir)
    largest, where = -1.0, ""
    for name, spec in base.specs.items():
        weight = base.read_tensor(name).float()
        num_wrong = int((~weight.isfinite()).sum())
        if num_wrong:
            values = "1 value that is" if num_wrong == 1 else f"{num_wrong} values that are"
            return f"{spec.hf_name} has {values} not finite"
        largest, where = max((largest, where), (float(weight.abs().max()), spec.hf_name))
    return f"all weights are finite; the largest, {largest:.3g}, is in {where}"
