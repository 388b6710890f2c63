"""The choice of the base that an adapter from 4-bit training is merged into, by the merged weights' validation loss.

The adapter fits the dequantized 4-bit weights exactly. The original 16-bit weights are the better model without it.
After fp8 training there is no choice: the adapter is merged into the original weights, which fp8 barely changes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from tune2gguf.base.checkpoint import BaseCheckpoint, open_base
from tune2gguf.export.measure.validation_set import ValidationSet
from tune2gguf.export.merge.adapter import Adapter
from tune2gguf.runs.run import Run

TRAINED = "trained"
MERGE_BASES = ORIGINAL, DEQUANTIZED = ("original", "dequantized")


@dataclass(frozen=True)
class MergeChoice:
    """The chosen base, and the losses that decided.

    Attributes:
        trained: the base as the adapter was trained over it
        chosen: the base that the adapter is merged into
        beside: the base of the GGUF that an adapter's GGUF is applied to
        kind: `original` or `dequantized`; None if there was no choice
        losses: validation loss of the merged weights by kind; empty if not measured
    """

    trained: BaseCheckpoint
    chosen: BaseCheckpoint
    kind: str | None
    losses: dict[str, float]
    beside: BaseCheckpoint

    def describe(self) -> str | None:
        """Return a sentence for the user, or None if there was no choice."""
        if self.kind is None:
            return None
        if not self.losses:
            return f"merged into the {self.kind} weights; the other ones were not measured"
        other = ORIGINAL if self.kind == DEQUANTIZED else DEQUANTIZED
        return (
            f"merged into the {self.kind} weights: validation loss {self.losses[self.kind]:.4f}, "
            f"into the {other} ones {self.losses[other]:.4f}"
        )


def choose_merge_base(
    run: Run,
    adapter: Adapter,
    validation: ValidationSet | None,
    *,
    requested: str | None = None,
    original_dir: str | Path | None = None,
) -> MergeChoice:
    """Open the base of the training, and choose the base to merge into.

    Args:
        validation: rows to measure on; None takes the dequantized weights, which the adapter fits exactly
        requested: `original` or `dequantized` instead of the measured choice
        original_dir: the 16-bit base of a run on a 4-bit one; None looks for it beside the 4-bit one

    Raises:
        ValueError: if the requested base is missing, or this run has no choice
    """
    if requested is not None and requested not in MERGE_BASES:
        raise ValueError(f"unknown merge base {requested!r}; choose from {', '.join(MERGE_BASES)}")
    stored = open_base(run.base_dir)
    if run.gguf_type is not None and original_dir is None:
        return _choose_beside_gguf(run, stored, adapter, validation, requested)
    if run.base_weights != "nf4":
        if requested is not None or original_dir is not None:
            raise ValueError(
                f"{run.run_dir} was not trained over 4-bit weights and has one base to merge into; leave --merge-base "
                "and --original-base out"
            )
        trained = stored.round_to_fp8() if run.base_weights == "fp8" else stored
        return MergeChoice(trained, stored, None, {}, stored)
    trained = stored if stored.holds_nf4 else stored.round_to_nf4()
    original = _open_original(stored, original_dir) if stored.holds_nf4 else stored
    if original is None:
        if requested == ORIGINAL:
            raise ValueError(f"{run.base_dir}: 16-bit weights not found; give their folder with --original-base")
        return MergeChoice(trained, trained, DEQUANTIZED, {}, trained)
    return _choose_better(trained, original, adapter, validation, requested)


def _choose_better(
    trained: BaseCheckpoint,
    original: BaseCheckpoint,
    adapter: Adapter,
    validation: ValidationSet | None,
    requested: str | None,
) -> MergeChoice:
    candidates, losses = {ORIGINAL: original, DEQUANTIZED: trained}, {}
    kind = DEQUANTIZED if requested is None else requested
    if requested is None and validation is not None:
        losses = _measure(trained, candidates, adapter, validation)
        kind = min(losses, key=losses.__getitem__)
    return MergeChoice(trained, candidates[kind], kind, losses, candidates[kind])


def _choose_beside_gguf(
    run: Run, stored: BaseCheckpoint, adapter: Adapter, validation: ValidationSet | None, requested: str | None
) -> MergeChoice:
    """Choose for a run over a GGUF's weights; the stored weights yield the same GGUF again."""
    trained = stored.round_to_gguf(run.gguf_type)
    if stored.gguf_path is not None:
        if requested is not None:
            raise ValueError(f"{stored.gguf_path} is the only base to merge into; leave --merge-base out")
        return MergeChoice(trained, stored, None, {}, stored)
    return replace(_choose_better(trained, stored, adapter, validation, requested), beside=stored)


def _open_original(stored: BaseCheckpoint, original_dir: str | Path | None) -> BaseCheckpoint | None:
    """Open the 16-bit base of a 4-bit one: `original_dir`, or the folder beside it with the same name."""
    if original_dir is None:
        name = stored.base_dir.resolve().name.removesuffix("-bnb-4bit")
        beside = [stored.base_dir.resolve().with_name(candidate) for candidate in (name, name.removeprefix("Meta-"))]
        original_dir = next((path for path in beside if path != stored.base_dir.resolve() and path.is_dir()), None)
        if original_dir is None:
            return None
    original = open_base(original_dir)
    if original.holds_nf4 or original.architecture != stored.architecture:
        reason = "it is 4-bit, too" if original.holds_nf4 else "its config.json differs"
        raise ValueError(f"{original_dir} does not hold the 16-bit weights of {stored.base_dir}: {reason}")
    return original


def _measure(
    trained: BaseCheckpoint, candidates: dict[str, BaseCheckpoint], adapter: Adapter, validation: ValidationSet
) -> dict[str, float]:
    # Imported here, because an export without a choice does not need torch.
    from tune2gguf.export.measure.step_losses import measure_steps
    from tune2gguf.export.measure.weight_sources import open_base_source, open_merged_source

    sources = {TRAINED: open_base_source(trained, adapter=adapter)}
    sources |= {kind: open_merged_source(base, adapter) for kind, base in candidates.items()}
    steps = measure_steps(sources, validation.rows, reference=TRAINED)
    return {kind: steps[kind].loss for kind in candidates}
