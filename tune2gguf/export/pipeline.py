"""`python scripts/export.py runs/NAME`: from a run folder, or a plain base, to GGUF files and their Modelfiles."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tune2gguf.cache import get_cache_dir
from tune2gguf.chat_formats import CHAT_FORMATS, ChatFormat
from tune2gguf.checkpoints.base import BaseCheckpoint, open_base
from tune2gguf.export.adapter import Adapter, read_adapter
from tune2gguf.export.gguf_llama import choose_types, list_gguf_tensors, write_metadata
from tune2gguf.export.kernels import load_kernels
from tune2gguf.export.modelfile import make_modelfile
from tune2gguf.export.one_pass import Converter, Output, append_tensors
from tune2gguf.export.quantized_cache import DEFAULT_MAX_BYTES, QuantizedCache
from tune2gguf.export.run_folder import FinishedRun, read_run
from tune2gguf.export.type_mix import QUANTIZATIONS, Quantization, count_bytes, get_quantization
from tune2gguf.export.vocabulary import read_vocabulary


@dataclass(frozen=True)
class ExportedModel:
    """One quantization of a run."""

    quantization: str
    gguf_path: Path
    modelfile_path: Path


def export_run(
    run_dir: str | Path,
    *,
    quantizations: Sequence[str] | None = None,
    adapter: str | None = None,
    base_dir: str | Path | None = None,
    overwrite: bool = False,
    num_threads: int | None = None,
    max_cache_bytes: int = DEFAULT_MAX_BYTES,
    system_prompt: str | None = None,
    show: bool = True,
) -> list[ExportedModel]:
    """Merge a run's adapter into its base and write GGUF files and Modelfiles to the run's `export` folder.

    Args:
        quantizations: None takes the one in the run's config.yaml
        adapter: `best` or `last`; None takes best where there is one
        base_dir: where the base is now, if not where the run's config.yaml says
        overwrite: replace files of an earlier export
        num_threads: None takes all cores
        max_cache_bytes: how much of the base's quantized tensors to keep for the next export; 0 keeps none
        system_prompt: goes into the Modelfile; only for a run whose rows all had this one
        show: progress bar

    Raises:
        ValueError: for anything missing or unfitting; no file is written under its final name
    """
    run = read_run(run_dir, adapter=adapter, base_dir=base_dir)
    chosen = _get_quantizations([run.quantization] if quantizations is None else quantizations)
    models = [_name_files(run, quantization, is_only=len(chosen) == 1) for quantization in chosen]
    texts = {
        model.modelfile_path: make_modelfile(
            model.gguf_path.name,
            chat_format=run.chat_format,
            context_length=run.max_seq_len,
            system_prompt=system_prompt,
        )
        for model in models
    }
    if not overwrite:
        _refuse_existing([path for model in models for path in (model.gguf_path, model.modelfile_path)])
    base = open_base(run.base_dir)
    _write_ggufs(
        {quantization: model.gguf_path for quantization, model in zip(chosen, models, strict=True)},
        base=base,
        adapter=read_adapter(run.adapter_dir, base.specs),
        name=run.name,
        chat_format=run.chat_format,
        num_threads=num_threads,
        max_cache_bytes=max_cache_bytes,
        show=show,
    )
    for path, text in texts.items():
        _write_text(path, text)
    return models


def export_base(
    base_dir: str | Path,
    out_path: str | Path,
    *,
    quantization: str,
    chat_format: str,
    overwrite: bool = False,
    num_threads: int | None = None,
    max_cache_bytes: int = DEFAULT_MAX_BYTES,
    show: bool = True,
) -> Path:
    """Write a base without an adapter as one GGUF, through the same code as a run's.

    Raises:
        ValueError: for anything missing or unfitting; no file is written under its final name
    """
    base_dir, out_path = Path(base_dir), Path(out_path)
    chosen = get_quantization(quantization)
    if chat_format not in CHAT_FORMATS:
        raise ValueError(f"unknown chat_format {chat_format!r}; choose from {', '.join(CHAT_FORMATS)}")
    if not overwrite:
        _refuse_existing([out_path])
    _write_ggufs(
        {chosen: out_path},
        base=open_base(base_dir),
        adapter=None,
        name=base_dir.resolve().name,
        chat_format=CHAT_FORMATS[chat_format],
        num_threads=num_threads,
        max_cache_bytes=max_cache_bytes,
        show=show,
    )
    return out_path


def _get_quantizations(names: Sequence[str]) -> list[Quantization]:
    unknown = [name for name in names if name.upper() not in QUANTIZATIONS]
    if unknown or not names:
        raise ValueError(
            f"unknown quantization {', '.join(unknown) or '(none given)'}; choose from {', '.join(QUANTIZATIONS)}"
        )
    return list(dict.fromkeys(get_quantization(name) for name in names))


def _name_files(run: FinishedRun, quantization: Quantization, *, is_only: bool) -> ExportedModel:
    stem = f"{run.name}-{quantization.name}"
    modelfile = "Modelfile" if is_only else f"Modelfile-{quantization.name}"
    return ExportedModel(quantization.name, run.export_dir / f"{stem}.gguf", run.export_dir / modelfile)


def _refuse_existing(paths: list[Path]) -> None:
    existing = [str(path) for path in paths if path.exists()]
    if existing:
        raise ValueError(f"{', '.join(existing)}: exists already; --force replaces it")


def _write_ggufs(
    paths: dict[Quantization, Path],
    *,
    base: BaseCheckpoint,
    adapter: Adapter | None,
    name: str,
    chat_format: ChatFormat,
    num_threads: int | None,
    max_cache_bytes: int,
    show: bool,
) -> None:
    from tqdm import tqdm

    architecture = base.architecture
    tensors = list_gguf_tensors(base.specs, architecture)
    vocabulary = read_vocabulary(base.base_dir, vocab_size=architecture.vocab_size, chat_format=chat_format)
    types = {quantization: choose_types(tensors, architecture, quantization) for quantization in paths}
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    sizes = {
        path: sum(count_bytes(types[quantization][name], shape) for name, shape in shapes.items())
        for quantization, path in paths.items()
    }
    kernels = load_kernels()
    cache = QuantizedCache(get_cache_dir() / "quantized", max_cache_bytes) if max_cache_bytes > 0 else None
    with _replace_at_the_end(sizes) as unfinished:
        for quantization, path in paths.items():
            write_metadata(
                unfinished[path],
                tensors,
                types[quantization],
                name=name,
                architecture=architecture,
                quantization=quantization,
                vocabulary=vocabulary,
                chat_template=chat_format.jinja_template,
                hf_config=_read_json(base.base_dir / "config.json"),
                generation_config=_read_json(base.base_dir / "generation_config.json"),
            )
        num_elements = sum(_count_elements(shape) for shape in shapes.values())
        label = "exporting " + (next(iter(paths)).name if len(paths) == 1 else f"{len(paths)} types")
        with tqdm(total=num_elements, desc=label, unit="", unit_scale=True, disable=not show, leave=False) as bar:
            append_tensors(
                [Output(unfinished[path], types[quantization]) for quantization, path in paths.items()],
                tensors,
                converter=Converter(base, adapter, kernels, cache),
                num_threads=_count_cores() if num_threads is None else num_threads,
                report=bar.update,
            )
    if cache is not None:
        cache.remove_oldest()


@contextmanager
def _replace_at_the_end(sizes: dict[Path, int]) -> Iterator[dict[Path, Path]]:
    """Yield a temporary path beside each path; they take the final names together, or vanish when the block fails.

    Raises:
        ValueError: if the disk cannot hold `sizes` bytes, or writing fails
    """
    folders = {path.parent for path in sizes}
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    needed, free = sum(sizes.values()), min(shutil.disk_usage(folder).free for folder in folders)
    if needed > free:
        raise ValueError(f"the files need {needed / 1e9:.1f} GB, but {folders.pop()} has {free / 1e9:.1f} GB free")
    unfinished = {path: path.with_name(f".{path.name}.unfinished") for path in sizes}
    try:
        yield unfinished
        for path, temporary in unfinished.items():
            os.replace(temporary, path)
    except OSError as error:
        raise ValueError(
            f"writing to {folders.pop()} failed: {error.strerror or error}; nothing was left there"
        ) from None
    finally:
        for temporary in unfinished.values():
            temporary.unlink(missing_ok=True)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.unfinished")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _read_json(path: Path) -> dict:
    """Return {} where there is no such file: generation_config.json is optional."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None


def _count_elements(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) == 2 else 1)


def _count_cores() -> int:
    """Cores this process may use, which a container can limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
