"""Choose what an export quantizes with: an importance matrix of the run's own training rows, one of a file, or none.

A matrix may help or harm: with validation rows a type is measured both ways, and the better one is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tune2gguf.base.checkpoint import BaseCheckpoint
from tune2gguf.export.gguf_file.imatrix import ImportanceMatrix, read_imatrix
from tune2gguf.export.gguf_file.llama import list_gguf_tensors
from tune2gguf.export.measure.validation_set import ValidationSet
from tune2gguf.export.merge.adapter import Adapter
from tune2gguf.export.results import open_bar
from tune2gguf.ggml.kernels import load_kernels
from tune2gguf.ggml.types import Quantization
from tune2gguf.runs.calibration import read_calibration_rows
from tune2gguf.runs.files import CALIBRATION_FILE
from tune2gguf.runs.run import Run


@dataclass(frozen=True)
class ImportancePlan:
    """What to quantize with, before anything is measured.

    Attributes:
        given: the matrix of a file
        rows: token ids to measure a matrix on; without rows and without a matrix nothing has one
    """

    given: ImportanceMatrix | None = None
    rows: Sequence[np.ndarray] = ()

    @property
    def is_any(self) -> bool:
        return self.given is not None or len(self.rows) > 0


@dataclass(frozen=True)
class ImportanceChoice:
    """What each type is quantized with.

    Attributes:
        matrix: None where there is none
        types: the types that are quantized with it
        losses: type -> validation loss without the matrix, and with it, of the types that were measured
    """

    matrix: ImportanceMatrix | None = None
    types: frozenset[Quantization] = frozenset()
    losses: dict[str, tuple[float, float]] = field(default_factory=dict)

    def get(self, quantization: Quantization) -> ImportanceMatrix | None:
        """Return the matrix that a type is quantized with."""
        return self.matrix if quantization in self.types else None

    def describe(self) -> list[str]:
        """Return a sentence for each type that was measured."""
        return [
            f"{name} {'with' if weighted < plain else 'without'} the importance matrix: validation loss "
            f"{min(plain, weighted):.4f}, {'without' if weighted < plain else 'with'} it {max(plain, weighted):.4f}"
            for name, (plain, weighted) in self.losses.items()
        ]


def plan_importance(
    run: Run, base: BaseCheckpoint, quantizations: Sequence[Quantization], *, imatrix: str | Path | None, wanted: bool
) -> ImportancePlan:
    """Return what files of these types can be quantized with; nothing slow is done.

    Args:
        imatrix: a file of llama-imatrix; None measures a matrix on the run's training rows
        wanted: False takes none

    Raises:
        ValueError: if the file cannot be read or is of another model, none of the types takes it, or one needs a matrix
            and there is none
    """
    names = [quantization.name for quantization in quantizations]
    needing = ", ".join(quantization.name for quantization in quantizations if quantization.needs_importance)
    takes_one = any(quantization.takes_importance for quantization in quantizations)
    if imatrix is not None:
        if not names:
            raise ValueError(f"--imatrix {imatrix}: nothing is quantized anew; the adapter was trained over this GGUF")
        if not takes_one:
            raise ValueError(f"--imatrix {imatrix}: {', '.join(names)} would be the same without it; leave it out")
        matrix = read_imatrix(imatrix)
        matrix.check({tensor.name: tensor.shape for tensor in list_gguf_tensors(base.specs, base.architecture)})
        return ImportancePlan(given=matrix)
    if needing and not wanted:
        raise ValueError(f"{needing} cannot be had without an importance matrix; leave --no-imatrix out")
    if not wanted or not takes_one:
        return ImportancePlan()
    rows = read_calibration_rows(run.run_dir)
    if needing and not rows:
        raise ValueError(
            f"{needing} needs an importance matrix, and {run.run_dir} has no {CALIBRATION_FILE} to measure one on (an "
            "earlier version made it); give a file of llama-imatrix with --imatrix"
        )
    return ImportancePlan(rows=rows)


def choose_importance(
    plan: ImportancePlan,
    base: BaseCheckpoint,
    adapter: Adapter,
    quantizations: Sequence[Quantization],
    validation: ValidationSet | None,
    *,
    name: str,
    show: bool,
) -> ImportanceChoice:
    """Measure the matrix, and which types are better with it.

    A matrix of a file is taken for all types that take one. One that is measured is taken where the type needs it, or
    has a lower validation loss with it; without validation rows by types alone that need it.

    Args:
        name: of the matrix that is measured
    """
    taking = [quantization for quantization in quantizations if quantization.takes_importance]
    if plan.given is not None:
        return ImportanceChoice(plan.given, frozenset(taking))
    needing = frozenset(quantization for quantization in taking if quantization.needs_importance)
    open_to_choice = [] if validation is None else [each for each in taking if each not in needing]
    if not plan.rows or not (needing or open_to_choice):
        return ImportanceChoice()
    matrix = _measure_matrix(plan, base, adapter, name=name, show=show)
    losses = {each.name: _measure_both(each, base, adapter, matrix, validation, show=show) for each in open_to_choice}
    better = {each for each in open_to_choice if losses[each.name][1] < losses[each.name][0]}
    return ImportanceChoice(matrix, needing | better, losses)


def _measure_matrix(
    plan: ImportancePlan, base: BaseCheckpoint, adapter: Adapter, *, name: str, show: bool
) -> ImportanceMatrix:
    # torch: an export without a matrix does without.
    from tune2gguf.export.measure.importance import measure_importance
    from tune2gguf.export.measure.weight_sources import open_merged_source

    with open_bar("measuring importance", total=base.architecture.num_layers, unit="layer", show=show) as bar:
        source = open_merged_source(base, adapter)
        return measure_importance(source, plan.rows, name=name, dataset=CALIBRATION_FILE, report=bar.update)


def _measure_both(
    quantization: Quantization,
    base: BaseCheckpoint,
    adapter: Adapter,
    matrix: ImportanceMatrix,
    validation: ValidationSet,
    *,
    show: bool,
) -> tuple[float, float]:
    """Return the validation loss of a type without and with the matrix."""
    from tune2gguf.export.measure.step_losses import measure_steps
    from tune2gguf.export.measure.weight_sources import open_quantized_source

    kernels = load_kernels()
    sources = {
        way: open_quantized_source(base, adapter, quantization, kernels, importance=importance)
        for way, importance in (("plain", None), ("weighted", matrix))
    }
    label, num_layers = f"comparing {quantization.name}", 2 * base.architecture.num_layers
    with open_bar(label, total=num_layers, unit="layer", show=show) as bar:
        steps = measure_steps(sources, validation.rows, reference="plain", report=bar.update)
    return steps["plain"].loss, steps["weighted"].loss
