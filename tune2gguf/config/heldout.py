"""The keys of validation: what they need, and when nothing reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

WAY_OUT = "hold rows out with dataset.validation_split or dataset.validation_files"


def find_validation_problems(settled: Mapping[str, Any], dataset: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield why the keys of validation cannot do what they say."""
    patience = settled.get("early_stopping_patience")
    if patience is not None and dataset is not None and not _holds_rows_out(dataset):
        yield f"early_stopping_patience={patience}: no row is held out, so that no best can be known; {WAY_OUT}"


def find_validation_warnings(settled: Mapping[str, Any], dataset: Mapping[str, Any]) -> Iterator[str]:
    """Yield which keys of validation are set for nothing."""
    if _holds_rows_out(dataset):
        return
    for name in ("eval_every_n_steps", "max_val_rows"):
        if settled[name] is not None:
            yield f"{name}={settled[name]} does nothing: no row is held out; {WAY_OUT}"


def _holds_rows_out(dataset: Mapping[str, Any]) -> bool:
    return dataset.get("validation_files") is not None or bool(dataset.get("validation_split"))
