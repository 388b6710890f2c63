"""The choice of tokens per pass: as many as the device's memory allows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tune2gguf.machine.fit import fits
from tune2gguf.machine.memory import RunSpec

AUTO = "auto"
# Share of the free memory: the estimate does not include the allocator's gaps.
USABLE_SHARE = 0.9
# Tokens per pass: above the first a longer pass gains nothing; below the second recomputing activations costs less.
MOST_TOKENS = {"cuda": 8192, "cpu": 2048, "mps": 2048}
LEAST_TOKENS = {"cuda": 1024, "cpu": 256, "mps": 256}


def choose_passes(
    spec: RunSpec, free: int, *, tokens_per_pass: int | str, checkpointing: bool | str, tokens_per_step: int
) -> RunSpec:
    """Return the spec with the first layout that fits, or the smallest if none does. Only `auto` values change.

    Shorter passes come before activation checkpointing, which computes every layer twice.

    Args:
        free: free bytes on the device
        tokens_per_pass, checkpointing: as in the config, a value or `auto`
        tokens_per_step: tokens of the fullest step in one process
    """
    layouts = list(_list_layouts(spec, tokens_per_pass, checkpointing, tokens_per_step))
    return next((layout for layout in layouts if fits(layout, int(USABLE_SHARE * free))), layouts[-1])


def _list_layouts(
    spec: RunSpec, tokens_per_pass: int | str, checkpointing: bool | str, tokens_per_step: int
) -> Iterator[RunSpec]:
    shortest = spec.longest_row
    longest = max(shortest, min(tokens_per_step, MOST_TOKENS[spec.device_type]))
    for recomputes in (False, True) if checkpointing == AUTO else (checkpointing,):
        tokens = longest if tokens_per_pass == AUTO else max(shortest, tokens_per_pass)
        is_last_resort = recomputes or checkpointing != AUTO
        least = shortest if is_last_resort else max(shortest, LEAST_TOKENS[spec.device_type])
        layout = replace(spec, tokens_per_pass=tokens, enable_activation_checkpointing=recomputes)
        yield layout
        while tokens_per_pass == AUTO and tokens > least:
            tokens = max(least, tokens // 2)
            yield replace(layout, tokens_per_pass=tokens)
