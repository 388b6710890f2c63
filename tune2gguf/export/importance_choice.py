"""The choice of an export's importance matrix: measured on the run's training rows, read from a file, or none.

A matrix may help or harm. With validation rows, each type is measured with and without it, and the better way is taken.
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
    """The source of an importance matrix, before anything is measured; without `given` and `rows` there is none.

    Attributes:
        given: the matrix from a file
        rows: token ids of each row to measure a matrix on
        is_measured: whether one is to be measured; earlier versions kept no rows for it
    """

    given: ImportanceMatrix | None = None
    rows: Sequence[np.ndarray] = ()
    is_measured: bool = False

    @property
    def is_any(self) -> bool:
        return self.given is not None or len(self.rows) > 0


@dataclass(frozen=True)
class ImportanceChoice:
    """The importance matrix of an export, and the types that use it.

    Attributes:
        matrix: None if there is none
        types: the types that are quantized with it
        losses: measured type -> validation loss without and with the matrix
        why_plain: type quantized without a matrix -> why it was not compared
    """

    matrix: ImportanceMatrix | None = None
    types: frozenset[Quantization] = frozenset()
    losses: dict[str, tuple[float, float]] = field(default_factory=dict)
    why_plain: dict[str, str] = field(default_factory=dict)

    def get(self, quantization: Quantization) -> ImportanceMatrix | None:
        """Return the matrix that a type is quantized with, or None."""
        return self.matrix if quantization in self.types else None

    def describe(self) -> list[str]:
        """Return a sentence for each type that was compared, or could not be."""
        return [
            *(
                f"{name} without an importance matrix: {why}; --imatrix takes one"
                for name, why in self.why_plain.items()
            ),
            *(
                f"{name} {'with' if weighted < plain else 'without'} the importance matrix: validation loss "
                f"{min(plain, weighted):.4f}, {'without' if weighted < plain else 'with'} it {max(plain, weighted):.4f}"
                for name, (plain, weighted) in self.losses.items()
            ),
        ]


def plan_importance(
    run: Run, base: BaseCheckpoint, quantizations: Sequence[Quantization], *, imatrix: str | Path | None, wanted: bool
) -> ImportancePlan:
    """Return the source of an importance matrix for these types, without slow work.

    Args:
        imatrix: a file of llama-imatrix; None measures a matrix on the run's training rows
        wanted: False: quantize without a matrix

    Raises:
        ValueError: if the file cannot be read or belongs to another model, no type takes it, or a type needs a matrix
            and there is none
    """
    names = [quantization.name for quantization in quantizations]
    needing = ", ".join(quantization.name for quantization in quantizations if quantization.needs_importance)
    takes_one = any(quantization.takes_importance for quantization in quantizations)
    if imatrix is not None:
        if not names:
            raise ValueError(
                f"--imatrix {imatrix}: nothing is quantized, as the adapter was trained over this GGUF; leave it out"
            )
        if not takes_one:
            raise ValueError(f"--imatrix {imatrix}: {', '.join(names)} would be the same without it; leave it out")
        matrix = read_imatrix(imatrix)
        matrix.check({tensor.name: tensor.shape for tensor in list_gguf_tensors(base.specs, base.architecture)})
        return ImportancePlan(given=matrix)
    if needing and not wanted:
        raise ValueError(f"{needing} needs an importance matrix; leave --no-imatrix out")
    if not wanted or not takes_one:
        return ImportancePlan()
    rows = read_calibration_rows(run.run_dir)
    if needing and not rows:
        raise ValueError(
            f"{needing} needs an importance matrix, but {run.run_dir} has no {CALIBRATION_FILE} to measure one on (it "
            "is of an earlier version); give a file of llama-imatrix with --imatrix"
        )
    return ImportancePlan(rows=rows, is_measured=True)


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
    """Measure the matrix, and choose the types that use it.

    A matrix from a file is used by all types that take one. A measured matrix is used by types that need it, and by
    types that have a lower validation loss with it. Without validation rows, only types that need it use it.

    Args:
        name: file name of the measured matrix
    """
    taking = [quantization for quantization in quantizations if quantization.takes_importance]
    if plan.given is not None:
        return ImportanceChoice(plan.given, frozenset(taking))
    needing = frozenset(quantization for quantization in taking if quantization.needs_importance)
    open_to_choice = [] if validation is None else [each for each in taking if each not in needing]
    why = "there are no validation rows to compare on" if plan.rows else f"the run kept no {CALIBRATION_FILE}"
    left = [each for each in taking if each not in needing and (validation is None or not plan.rows)]
    why_plain = {each.name: why for each in left} if plan.is_measured else {}
    if not plan.rows or not (needing or open_to_choice):
        return ImportanceChoice(why_plain=why_plain)
    matrix = _measure_matrix(plan, base, adapter, name=name, show=show)
    losses = {each.name: _measure_both(each, base, adapter, matrix, validation, show=show) for each in open_to_choice}
    better = {each for each in open_to_choice if losses[each.name][1] < losses[each.name][0]}
    return ImportanceChoice(matrix, needing | better, losses, why_plain)


def _measure_matrix(
    plan: ImportancePlan, base: BaseCheckpoint, adapter: Adapter, *, name: str, show: bool
) -> ImportanceMatrix:
    # Imported here, because an export without a matrix does not need torch.
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
