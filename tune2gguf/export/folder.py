"""The files of an export folder: their names, and which of them are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tune2gguf.commands import format_script
from tune2gguf.files.atomic import check_name
from tune2gguf.ggml.types import QUANTIZATIONS, Quantization, get_quantizations
from tune2gguf.runs.run import Run

MODEL_CARD = "README.md"
BESIDE = " + adapter"  # suffix of a step: the adapter's GGUF applied to a base GGUF
_ADAPTER_END = "-adapter.gguf"
_ADAPTER_MODELFILE = "Modelfile-adapter"


@dataclass(frozen=True)
class ExportedModel:
    """One quantization of a run."""

    quantization: str
    gguf_path: Path
    modelfile_path: Path

    @property
    def step(self) -> str:
        """The name of its step in the proof."""
        return self.quantization


@dataclass(frozen=True)
class ExportedAdapter:
    """The adapter's own GGUF, and the base GGUF that it is applied to."""

    quantization: str
    base_path: Path
    adapter_path: Path
    modelfile_path: Path

    @property
    def step(self) -> str:
        """The name of its step in the proof."""
        return f"{self.quantization}{BESIDE}"

    def list_paths(self) -> list[Path]:
        return [self.base_path, self.adapter_path, self.modelfile_path]


@dataclass(frozen=True)
class ExportFiles:
    """The files of an export, without the folder's model card and importance matrix."""

    models: list[ExportedModel]
    adapter: ExportedAdapter | None
    merged_dir: Path | None

    @property
    def quantizations(self) -> list[Quantization]:
        """The types of the merged files."""
        return [QUANTIZATIONS[model.quantization] for model in self.models]

    @property
    def merges(self) -> bool:
        """Whether a file holds the base's weights with the adapter's added."""
        return bool(self.models) or self.merged_dir is not None

    def list_paths(self) -> list[Path]:
        """Return the paths of all these files, and of the merged model's folder."""
        paths = [path for model in self.models for path in (model.gguf_path, model.modelfile_path)]
        paths += [] if self.adapter is None else self.adapter.list_paths()
        return paths if self.merged_dir is None else [*paths, self.merged_dir]


def plan_files(
    run: Run, quantizations: Sequence[str] | None, *, with_adapter_gguf: bool, with_merged_hf: bool
) -> ExportFiles:
    """Return the files of an export; a run over a GGUF is served with that GGUF and the adapter's.

    Args:
        quantizations: types of the merged files; None takes the run's type, and none for a run over a GGUF

    Raises:
        ValueError: if a type is unknown, or a name cannot be written here
    """
    served = None if run.gguf_type is None else QUANTIZATIONS[run.gguf_type]
    if quantizations is None and served is None:
        quantizations = [run.quantization]
    merged = [] if quantizations is None else get_quantizations(quantizations)
    adapter = None
    if with_adapter_gguf or served is not None:
        adapter = _name_adapter(run.export_dir, run.name, served or merged[0])
    merged_dir = run.export_dir / f"{run.name}-merged" if with_merged_hf else None
    return ExportFiles(name_models(run.export_dir, run.name, merged), adapter, merged_dir)


def name_models(export_dir: Path, name: str, quantizations: Sequence[Quantization]) -> list[ExportedModel]:
    """Return the files of each type.

    Raises:
        ValueError: if a name of theirs, or of their base's and adapter's files, cannot be written here
    """
    for quantization in quantizations:
        check_name(export_dir / f"{name}-{quantization.name}.gguf")
        _name_adapter(export_dir, name, quantization)
    return [_name_model(export_dir, name, one, is_only=len(quantizations) == 1) for one in quantizations]


def _name_model(export_dir: Path, name: str, quantization: Quantization, *, is_only: bool) -> ExportedModel:
    gguf_path = export_dir / f"{name}-{quantization.name}.gguf"
    plain, named = export_dir / "Modelfile", export_dir / f"Modelfile-{quantization.name}"
    # Each GGUF has one Modelfile: the one that serves it already, never another GGUF's.
    serves_it = plain.is_file() and _read_served_name(plain) == gguf_path.name
    is_first = is_only and not plain.is_file() and not named.is_file()
    modelfile = plain if serves_it or is_first else named
    return ExportedModel(quantization.name, gguf_path, modelfile)


def name_imatrix(run: Run) -> Path:
    """Return the path of a measured importance matrix. Raises ValueError if its name cannot be written here."""
    path = run.export_dir / f"{run.name}-imatrix.gguf"
    check_name(path)
    return path


def _name_adapter(export_dir: Path, name: str, quantization: Quantization) -> ExportedAdapter:
    base_path = export_dir / f"{name}-base-{quantization.name}.gguf"
    adapter_path = export_dir / f"{name}{_ADAPTER_END}"
    for path in (base_path, adapter_path):
        check_name(path)
    return ExportedAdapter(quantization.name, base_path, adapter_path, export_dir / _ADAPTER_MODELFILE)


def _read_served_name(modelfile: Path, command: str = "FROM") -> str:
    # Not splitlines: a name may hold other line separators.
    lines = modelfile.read_bytes().decode("utf-8", errors="replace").split("\n")
    return next((line.removeprefix(f"{command} ./") for line in lines if line.startswith(f"{command} ./")), "")


def list_served(run: Run) -> list[tuple[Path, str]]:
    """Return each GGUF of a whole model in the export folder, with the name of the Modelfile that serves it."""
    modelfiles = sorted(filter(Path.is_file, run.export_dir.glob("Modelfile*")))
    modelfiles = [path for path in modelfiles if path.name != _ADAPTER_MODELFILE]
    served = [(run.export_dir / _read_served_name(modelfile), modelfile.name) for modelfile in modelfiles]
    return [(path, name) for path, name in served if path.is_file()]


def find_newest_gguf(run: Run) -> Path:
    """Return the GGUF of the whole model that was exported last.

    Raises:
        ValueError: if there is none
    """
    served = [path for path, _ in list_served(run)]
    if not served:
        command = format_script("export", run.run_dir)
        raise ValueError(f"{run.export_dir} has no GGUF yet. First:\n  {command}")
    return max(served, key=lambda path: path.stat().st_mtime)


def find_adapter_files(run: Run) -> tuple[Path, Path]:
    """Return the base GGUF and the adapter GGUF that Modelfile-adapter names.

    Raises:
        ValueError: if the adapter was not exported
    """
    modelfile = run.export_dir / _ADAPTER_MODELFILE
    if not modelfile.is_file():
        option = () if run.gguf_type is not None else ("--adapter-gguf",)
        command = format_script("export", run.run_dir, *option)
        raise ValueError(f"{run.export_dir} has no adapter GGUF yet. First:\n  {command}")
    return tuple(run.export_dir / _read_served_name(modelfile, command) for command in ("FROM", "ADAPTER"))


def find_served_files(run: Run) -> tuple[Path, Path | None]:
    """Return the GGUF that was exported last, and the adapter's GGUF if the run is served as two files.

    Raises:
        ValueError: if nothing was exported
    """
    return (find_newest_gguf(run), None) if run.gguf_type is None else find_adapter_files(run)
