"""The export, `python scripts/export.py runs/NAME`: from a run folder or a base to GGUF files and Modelfiles."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tune2gguf.base.checkpoint import BaseCheckpoint, open_base
from tune2gguf.base.source import read_source
from tune2gguf.export.adapter_gguf import write_adapter_gguf
from tune2gguf.export.chat_template import choose_chat_template
from tune2gguf.export.folder import (
    MODEL_CARD,
    ExportedAdapter,
    ExportedModel,
    ExportFiles,
    find_adapter_files,
    list_served,
    name_imatrix,
    name_models,
    plan_files,
)
from tune2gguf.export.gguf_file.imatrix import write_imatrix
from tune2gguf.export.gguf_file.vocabulary import (
    LLAMA3_PRE_NAME,
    check_gguf_vocabulary,
    read_sampling,
    read_vocabulary,
)
from tune2gguf.export.gguf_files import count_file_bytes, write_gguf_files
from tune2gguf.export.importance_choice import ImportanceChoice, choose_importance, plan_importance
from tune2gguf.export.licence import Licence, find_licence
from tune2gguf.export.measure.validation_set import load_validation_rows
from tune2gguf.export.merge.adapter import Adapter, read_adapter
from tune2gguf.export.merge_choice import MergeChoice, choose_merge_base
from tune2gguf.export.merged_hf import write_merged_hf
from tune2gguf.export.model_card import make_model_card
from tune2gguf.export.modelfile import DEFAULT_TEMPERATURE, make_modelfile
from tune2gguf.export.results import check_free_space, claim_folder, explain_write_errors, open_bar
from tune2gguf.files.atomic import write_file, write_text
from tune2gguf.ggml.types import QUANTIZATIONS, get_quantizations
from tune2gguf.machine.cpu import check_num_threads
from tune2gguf.runs.files import PROOF_FILE
from tune2gguf.runs.run import Run, open_run
from tune2gguf.tokenizer.templates import CHAT_TEMPLATES, ChatTemplate

DEFAULT_VALIDATION_ROWS = 16


@dataclass(frozen=True)
class Export:
    """A run's export: its choices and the files it wrote."""

    run: Run
    chat_template: ChatTemplate
    merge: MergeChoice
    files: ExportFiles
    importance: ImportanceChoice

    @property
    def models(self) -> list[ExportedModel]:
        return self.files.models

    @property
    def adapter(self) -> ExportedAdapter | None:
        return self.files.adapter

    @property
    def merged_dir(self) -> Path | None:
        return self.files.merged_dir

    @property
    def served(self) -> ExportedModel | ExportedAdapter:
        """The one model to hand on: the first; for a run over a GGUF, that GGUF with the adapter."""
        return self.adapter if self.adapter is not None and self.run.gguf_type is not None else self.models[0]

    @property
    def measured_importance(self) -> bool:
        """Whether the matrix was measured, and so is among the files."""
        matrix = self.importance.matrix
        return matrix is not None and matrix.name == self.imatrix_path.name

    @property
    def imatrix_path(self) -> Path:
        """The path of a measured importance matrix."""
        return name_imatrix(self.run)

    @property
    def model_card_path(self) -> Path:
        return self.run.export_dir / MODEL_CARD

    def list_paths(self) -> list[Path]:
        """Return all paths that were written."""
        measured = [self.imatrix_path] if self.measured_importance else []
        return [*self.files.list_paths(), *measured, self.model_card_path]


def export_run(
    run_dir: str | Path,
    *,
    quantizations: Sequence[str] | None = None,
    adapter: str | None = None,
    base_dir: str | Path | None = None,
    merge_base: str | None = None,
    original_base_dir: str | Path | None = None,
    num_validation_rows: int = DEFAULT_VALIDATION_ROWS,
    with_adapter_gguf: bool = False,
    with_merged_hf: bool = False,
    imatrix: str | Path | None = None,
    with_importance: bool = True,
    temperature: float = DEFAULT_TEMPERATURE,
    overwrite: bool = False,
    num_threads: int | None = None,
    show: bool = True,
) -> Export:
    """Merge a run's adapter into its base; write GGUF files, Modelfiles and a model card to the run's `export` folder.

    For a run over a GGUF, write that GGUF and the adapter's; merge nothing unless `quantizations` is given.

    Args:
        quantizations: types of the merged files; None takes the type in the run's config.yaml
        adapter, base_dir: as in open_run
        merge_base: `original` or `dequantized`, for a run over 4-bit weights; None takes the better one
        original_base_dir: the 16-bit weights of a 4-bit base; None looks for them beside it
        num_validation_rows: rows that choose between bases, and between types with and without a matrix
        with_adapter_gguf: also write the adapter's own GGUF, and the base in the first type
        with_merged_hf: also write the merged model as a Hugging Face folder
        imatrix: an importance matrix of llama-imatrix; None measures one on the run's training rows and uses it if it
            lowers the validation loss
        with_importance: False quantizes without a matrix
        temperature: sampling temperature in the Modelfiles
        overwrite: replace files of an earlier export
        num_threads: None takes all cores
        show: show progress bars

    Raises:
        ValueError: if something is missing or does not fit; no file is then left under its final name
    """
    check_num_threads(num_threads)
    if num_validation_rows < 0:
        raise ValueError(f"--proof-rows must be at least 0, got {num_validation_rows}")
    run = open_run(run_dir, adapter=adapter, base_dir=base_dir)
    base = open_base(run.base_dir)
    files = plan_files(run, quantizations, with_adapter_gguf=with_adapter_gguf, with_merged_hf=with_merged_hf)
    if merge_base is not None and not files.merges:
        raise ValueError(f"--merge-base {merge_base}: nothing is merged; choose a type with --quantization")
    plan = plan_importance(run, base, files.quantizations, imatrix=imatrix, wanted=with_importance)
    if not overwrite:
        # Every export replaces the model card, which describes the folder, and the importance matrix.
        _refuse_existing(files.list_paths())
    chat_template = choose_chat_template(run, base)
    licence = _find_licence(base, chat_template)
    served = {"chat_template": chat_template, "temperature": temperature, "system_prompt": run.system_prompt}
    modelfiles = _make_modelfiles(files, licence, context_length=run.max_seq_len, **served)
    lora = read_adapter(run.adapter_dir, base.specs)
    validation = load_validation_rows(run, num_rows=num_validation_rows) if files.merges else None
    merge = choose_merge_base(run, lora, validation, requested=merge_base, original_dir=original_base_dir)
    export = Export(run, chat_template, merge, files, ImportanceChoice())
    with explain_write_errors(run.export_dir), claim_folder(run.export_dir):
        check_free_space(run.export_dir, _count_bytes(export, lora, has_importance=plan.is_any))
        name = export.imatrix_path.name
        choice = choose_importance(plan, merge.chosen, lora, files.quantizations, validation, name=name, show=show)
        export = replace(export, importance=choice)
        _write_weights(export, lora, num_threads=num_threads, show=show)
        # The old proof is of the replaced files.
        (run.export_dir / PROOF_FILE).unlink(missing_ok=True)
        for path, text in modelfiles.items():
            write_text(path, text)
        write_text(export.model_card_path, _describe(export, licence, temperature))
    return export


def _describe(export: Export, licence: Licence, temperature: float) -> str:
    """Return the model card of all that is in the folder now."""
    run = export.run
    return make_model_card(
        run,
        licence=licence,
        files=list_served(run),
        adapter_files=find_adapter_files(run) if export.adapter is not None else None,
        temperature=temperature,
        takes_tools=export.chat_template.takes_tools,
        merge=export.merge.describe() if export.models else None,
    )


def find_export_problems(
    base: BaseCheckpoint, run_dir: Path, *, quantization: str, chat_template: ChatTemplate, max_seq_len: int
) -> Iterator[str]:
    """Yield the reasons why a run that has not begun cannot be exported, by the export's own checks."""
    try:
        run_dir = run_dir.absolute()
        models = name_models(run_dir / "export", run_dir.name, [QUANTIZATIONS[quantization]])
        licence = _find_licence(base, chat_template)
        served = {"chat_template": chat_template, "context_length": max_seq_len, "system_prompt": None}
        _make_modelfiles(ExportFiles(models, None, None), licence, **served)
    except ValueError as error:
        yield str(error)


def check_room(base: BaseCheckpoint, run_dir: Path, quantization: str) -> None:
    """Raise ValueError if the disk cannot hold the GGUF of a run that has not begun."""
    nearest = next(parent for parent in run_dir.absolute().parents if parent.exists())
    check_free_space(nearest, count_file_bytes(base, QUANTIZATIONS[quantization]))


def _find_licence(base: BaseCheckpoint, chat_template: ChatTemplate) -> Licence:
    """Find the base's licence, and check early that a GGUF can hold its tokenizer and sampling parameters."""
    vocabulary = read_vocabulary(base.base_dir, vocab_size=base.architecture.vocab_size, chat_template=chat_template)
    if base.gguf_path is not None:
        check_gguf_vocabulary(base.gguf_path, vocabulary)
    read_sampling(base.base_dir)
    return find_licence(
        base.base_dir,
        source=read_source(base.base_dir),
        architecture=base.architecture,
        has_llama3_tokenizer=vocabulary.pre == LLAMA3_PRE_NAME,
    )


def export_base(
    base_dir: str | Path,
    out_path: str | Path,
    *,
    quantization: str,
    chat_template: str,
    takes_tools: bool = False,
    num_threads: int | None = None,
    show: bool = True,
) -> Path:
    """Write a base without an adapter as one GGUF, with the same code as a run's export.

    Args:
        takes_tools: whether its chat template takes tools

    Raises:
        ValueError: if something is missing or does not fit; no file is then written under its final name
    """
    base_dir, out_path = Path(base_dir), Path(out_path)
    [chosen] = get_quantizations([quantization])
    if chat_template not in CHAT_TEMPLATES:
        raise ValueError(f"unknown chat_template {chat_template!r}; choose from {', '.join(CHAT_TEMPLATES)}")
    _refuse_existing([out_path])
    base = open_base(base_dir)
    served = CHAT_TEMPLATES[chat_template]
    out_path.parent.mkdir(parents=True, exist_ok=True)
    check_free_space(out_path.parent, count_file_bytes(base, chosen))
    write_gguf_files(
        {chosen: out_path},
        base=base,
        adapter=None,
        name=base_dir.resolve().name,
        chat_template=served.with_tools() if takes_tools else served,
        importance=ImportanceChoice(),
        num_threads=num_threads,
        show=show,
    )
    return out_path


def _refuse_existing(paths: list[Path]) -> None:
    existing = [str(path) for path in paths if path.exists()]
    if existing:
        raise ValueError(f"{', '.join(existing)}: exists already; --force replaces it")


def _make_modelfiles(files: ExportFiles, licence: Licence, **served: Any) -> dict[Path, str]:
    """Return each Modelfile's text; `served` holds make_modelfile's other arguments."""
    named = [(model.modelfile_path, model.gguf_path.name, None) for model in files.models]
    if files.adapter is not None:
        adapter = files.adapter
        named.append((adapter.modelfile_path, adapter.base_path.name, adapter.adapter_path.name))
    return {
        path: make_modelfile(gguf_name, adapter_name=adapter_name, licence=licence.text, **served)
        for path, gguf_name, adapter_name in named
    }


def _count_bytes(export: Export, adapter: Adapter, *, has_importance: bool) -> int:
    base, files = export.merge.chosen, export.files
    types = list(files.quantizations)
    num_bytes = 0
    if files.adapter is not None:
        types.append(QUANTIZATIONS[files.adapter.quantization])
        num_bytes += sum(pair.lora_a.nbytes + pair.lora_b.nbytes for pair in adapter.pairs.values())
    if files.merged_dir is not None:
        num_bytes += count_file_bytes(base, QUANTIZATIONS["BF16"])
    return num_bytes + sum(count_file_bytes(base, one, has_importance=has_importance) for one in types)


def _write_weights(export: Export, adapter: Adapter, *, num_threads: int | None, show: bool) -> None:
    """Write the files that hold weights, small ones first: errors come before the long part."""
    served = {"chat_template": export.chat_template, "num_threads": num_threads, "show": show}
    if export.measured_importance:
        with write_file(export.imatrix_path) as unfinished:
            write_imatrix(unfinished, export.importance.matrix)
    if export.adapter is not None:
        _write_adapter(export, adapter, **served)
    if export.merged_dir is not None:
        base = export.merge.chosen
        num_elements = sum(math.prod(spec.shape) for spec in base.specs.values())
        with open_bar("merging", total=num_elements, show=show) as bar:
            write_merged_hf(
                export.merged_dir, base=base, adapter=adapter, chat_template=export.chat_template, report=bar.update
            )
    if export.models:
        write_gguf_files(
            {QUANTIZATIONS[model.quantization]: model.gguf_path for model in export.models},
            base=export.merge.chosen,
            adapter=adapter,
            name=export.run.name,
            importance=export.importance,
            **served,
        )


def _write_adapter(export: Export, adapter: Adapter, **served: Any) -> None:
    """Write the adapter's GGUF and the base's; `served` holds write_gguf_files' other arguments."""
    run, files = export.run, export.adapter
    with write_file(files.adapter_path) as unfinished:
        write_adapter_gguf(unfinished, adapter, specs=export.merge.chosen.specs, name=run.name)
    write_gguf_files(
        {QUANTIZATIONS[files.quantization]: files.base_path},
        base=export.merge.beside,
        adapter=None,
        name=run.base_dir.resolve().name,
        # A run over a GGUF was trained on weights that were quantized without a matrix.
        importance=ImportanceChoice() if run.gguf_type is not None else export.importance,
        **served,
    )
