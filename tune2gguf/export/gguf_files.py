"""Write GGUF files of several types in one reading of the base; they get their names together, at the end."""

from __future__ import annotations

import json
from pathlib import Path

from tune2gguf.export.gguf_file.kernels import load_kernels
from tune2gguf.export.gguf_file.llama import GGUFTensor, choose_types, list_gguf_tensors, write_metadata
from tune2gguf.export.gguf_file.types import Quantization, count_bytes
from tune2gguf.export.gguf_file.vocabulary import read_vocabulary
from tune2gguf.export.merge.adapter import Adapter
from tune2gguf.export.merge.base import MergeBase
from tune2gguf.export.one_pass import Converter, Output, append_tensors
from tune2gguf.export.progress import open_bar
from tune2gguf.export.results import replace_at_the_end
from tune2gguf.machine.cpu import count_cores
from tune2gguf.tokenizer.templates import ChatTemplate


def write_gguf_files(
    paths: dict[Quantization, Path],
    *,
    base: MergeBase,
    adapter: Adapter | None,
    name: str,
    chat_template: ChatTemplate,
    num_threads: int | None,
    show: bool,
) -> None:
    """Write one file for each type; existing files are replaced.

    Args:
        adapter: None writes the base as it is
        name: general.name of the files
        num_threads: None takes all cores

    Raises:
        ValueError: if the tokenizer cannot be written, the disk is full, or a weight is not finite; then no file is
            left, and none is replaced
    """
    tensors = list_gguf_tensors(base.specs, base.architecture)
    types = {quantization: choose_types(tensors, base.architecture, quantization) for quantization in paths}
    converter = Converter(base, adapter, load_kernels())
    with replace_at_the_end(list(paths.values())) as unfinished:
        outputs = {quantization: Output(unfinished[path], types[quantization]) for quantization, path in paths.items()}
        _write_headers(outputs, tensors, base=base, name=name, chat_template=chat_template)
        num_elements = sum(_count_elements(tensor.shape) for tensor in tensors)
        label = "exporting " + (next(iter(paths)).name if len(paths) == 1 else f"{len(paths)} types")
        with open_bar(label, total=num_elements, show=show) as bar:
            append_tensors(
                list(outputs.values()),
                tensors,
                converter=converter,
                num_threads=count_cores() if num_threads is None else num_threads,
                report=bar.update,
            )


def _write_headers(
    outputs: dict[Quantization, Output],
    tensors: list[GGUFTensor],
    *,
    base: MergeBase,
    name: str,
    chat_template: ChatTemplate,
) -> None:
    vocabulary = read_vocabulary(base.base_dir, vocab_size=base.architecture.vocab_size, chat_template=chat_template)
    for quantization, output in outputs.items():
        write_metadata(
            output.path,
            tensors,
            output.types,
            name=name,
            architecture=base.architecture,
            quantization=quantization,
            vocabulary=vocabulary,
            jinja_template=chat_template.jinja_template,
            hf_config=_read_json(base.base_dir / "config.json"),
            generation_config=_read_json(base.base_dir / "generation_config.json"),
        )


def _read_json(path: Path) -> dict:
    """Return {} where there is no such file: generation_config.json is optional."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None


def count_file_bytes(base: MergeBase, quantization: Quantization) -> int:
    """Return the size in bytes of all tensors in a file of this type."""
    tensors = list_gguf_tensors(base.specs, base.architecture)
    types = choose_types(tensors, base.architecture, quantization)
    return sum(count_bytes(types[tensor.name], tensor.shape) for tensor in tensors)


def _count_elements(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) == 2 else 1)
