"""Choose the importance matrix of an export: measured on the run's own training rows, read from a file, or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tune2gguf.base.checkpoint import BaseCheckpoint
from tune2gguf.export.gguf_file.imatrix import ImportanceMatrix, read_imatrix
from tune2gguf.export.gguf_file.llama import list_gguf_tensors
from tune2gguf.export.merge.adapter import Adapter
from tune2gguf.export.results import open_bar
from tune2gguf.ggml.types import Quantization
from tune2gguf.runs.calibration import read_calibration_rows
from tune2gguf.runs.files import CALIBRATION_FILE
from tune2gguf.runs.run import Run


@dataclass(frozen=True)
class ImportanceChoice:
    """What an export quantizes with: the matrix of a file, or rows to measure one on, or nothing."""

    given: ImportanceMatrix | None = None
    rows: Sequence[np.ndarray] = ()

    @property
    def is_any(self) -> bool:
        return self.given is not None or len(self.rows) > 0

    def measure(self, base: BaseCheckpoint, adapter: Adapter, *, name: str, show: bool) -> ImportanceMatrix | None:
        """Return the matrix; one that is not given is measured in the merged model, and called `name`."""
        if self.given is not None or not self.rows:
            return self.given
        # torch: an export without a matrix does without.
        from tune2gguf.export.measure.importance import measure_importance
        from tune2gguf.export.measure.weight_sources import open_merged_source

        with open_bar("measuring importance", total=base.architecture.num_layers, unit="layer", show=show) as bar:
            source = open_merged_source(base, adapter)
            return measure_importance(source, self.rows, name=name, dataset=CALIBRATION_FILE, report=bar.update)


def choose_importance(
    run: Run, base: BaseCheckpoint, quantizations: Sequence[Quantization], *, imatrix: str | Path | None, wanted: bool
) -> ImportanceChoice:
    """Choose the matrix that files of these types are quantized with.

    Args:
        imatrix: a file of llama-imatrix; None measures one on the run's training rows
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
        return ImportanceChoice(given=matrix)
    if needing and not wanted:
        raise ValueError(f"{needing} cannot be had without an importance matrix; leave --no-imatrix out")
    if not wanted or not takes_one:
        return ImportanceChoice()
    rows = read_calibration_rows(run.run_dir)
    if needing and not rows:
        raise ValueError(
            f"{needing} needs an importance matrix, and {run.run_dir} has no {CALIBRATION_FILE} to measure one on (an "
            "earlier version made it); give a file of llama-imatrix with --imatrix"
        )
    return ImportanceChoice(rows=rows)
