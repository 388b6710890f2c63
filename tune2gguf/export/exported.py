"""What an export leaves in a run's export folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tune2gguf.export.merge_choice import MergeChoice
from tune2gguf.runs.run import Run

MODEL_CARD = "README.md"


@dataclass(frozen=True)
class ExportedModel:
    """One quantization of a run."""

    quantization: str
    gguf_path: Path
    modelfile_path: Path


@dataclass(frozen=True)
class Export:
    """What an export wrote."""

    run: Run
    merge: MergeChoice
    models: list[ExportedModel]
    adapter_path: Path | None
    merged_dir: Path | None
    model_card_path: Path

    def list_paths(self) -> list[Path]:
        """Return everything that was written."""
        files = [path for model in self.models for path in (model.gguf_path, model.modelfile_path)]
        extras = [path for path in (self.adapter_path, self.merged_dir) if path is not None]
        return [*files, *extras, self.model_card_path]
