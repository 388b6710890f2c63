"""Write type_mix.txt: llama-quantize's type for each tensor of the real models, from its dry run.

python -m tests.parity.make_type_mix
"""

from __future__ import annotations

import math
import re
import tempfile
from itertools import groupby
from pathlib import Path

import numpy as np

from tests.parity.llama_cpp_oracle import find_missing, plan_quantization
from tests.parity.make_gguf_digests import IMPORTANCE_TYPES, PLAIN_TYPES
from tune2gguf.base.layout import list_tensors
from tune2gguf.export.gguf_file.llama import GGUFTensor, list_gguf_tensors
from tune2gguf.model.architectures import ARCHITECTURES, Architecture

WITH_IMPORTANCE = "+imatrix"  # after the type
TYPE_MIX_FILE = Path(__file__).with_name("type_mix.txt")
HEADER = "# Types that llama-quantize gives, layer by layer (TYPE*LAYERS); made by make_type_mix.py from its dry run\n"


def main() -> None:
    missing = find_missing()
    if missing is not None:
        raise SystemExit(missing)
    with tempfile.TemporaryDirectory() as folder:
        blocks = [make_block(name, Path(folder) / "sparse.gguf") for name in ARCHITECTURES]
    TYPE_MIX_FILE.write_text(HEADER + "".join(blocks))
    print(TYPE_MIX_FILE)


def make_block(name: str, gguf_path: Path) -> str:
    """Return the lines of one model. The dry run reads a bf16 file with its shapes and no weights."""
    architecture = ARCHITECTURES[name]
    tensors = list_real_tensors(architecture)
    write_sparse_gguf(gguf_path, architecture, tensors)
    lines = []
    for label, names in (("", PLAIN_TYPES), (WITH_IMPORTANCE, IMPORTANCE_TYPES)):
        lines += _plan(name, gguf_path, tensors, names, label=label)
    return "".join(lines)


def _plan(name: str, gguf_path: Path, tensors: list[GGUFTensor], names: list[str], *, label: str) -> list[str]:
    log = plan_quantization(gguf_path, names, has_importance=bool(label))
    parts = re.split(r"^quantization (\S+)$", log, flags=re.MULTILINE)[1:]
    lines = []
    for quantization, text in zip(parts[::2], parts[1::2], strict=True):
        planned = dict(re.findall(r"\] +(\S+) +- \[[^\]]*\], type = +\S+, size = .*?MiB -> .*?\((\w+)\)", text))
        # Unchanged tensors have no arrow: norms, and all tensors if the type is bf16.
        kept = {tensor.name: "F32" if len(tensor.shape) == 1 else "BF16" for tensor in tensors}
        lines += format_types(name, quantization + label, kept | {key: value.upper() for key, value in planned.items()})
    return lines


def list_real_tensors(architecture: Architecture) -> list[GGUFTensor]:
    return list_gguf_tensors({spec.tune_name: spec for spec in list_tensors(architecture)}, architecture)


def format_types(model: str, quantization: str, types: dict[str, str]) -> list[str]:
    """Return one line per kind of matrix: `MODEL QUANTIZATION PART TYPE*LAYERS ...`."""
    by_part: dict[str, list[str]] = {}
    for name, ggml_type in types.items():
        part = re.sub(r"^blk\.\d+\.", "", name).removesuffix(".weight")
        by_part.setdefault(part, []).append(ggml_type)
    return [
        f"{model} {quantization} {part} "
        + " ".join(f"{ggml_type}*{len(list(group))}" for ggml_type, group in groupby(layers))
        + "\n"
        for part, layers in sorted(by_part.items())
    ]


def write_sparse_gguf(path: Path, architecture: Architecture, tensors: list[GGUFTensor]) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_block_count(architecture.num_layers)
    writer.add_context_length(architecture.max_position_embeddings)
    writer.add_embedding_length(architecture.embed_dim)
    writer.add_feed_forward_length(architecture.intermediate_dim)
    writer.add_head_count(architecture.num_heads)
    writer.add_head_count_kv(architecture.num_kv_heads)
    writer.add_layer_norm_rms_eps(architecture.norm_eps)
    writer.add_rope_dimension_count(architecture.head_dim)
    writer.add_vocab_size(architecture.vocab_size)
    size = 0
    for tensor in tensors:
        is_norm = len(tensor.shape) == 1
        num_bytes = math.prod(tensor.shape) * (4 if is_norm else 2)
        raw = GGMLQuantizationType.F32 if is_norm else GGMLQuantizationType.BF16
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), num_bytes, raw_dtype=raw)
        size += num_bytes + -num_bytes % 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_padding(writer.fout[0], writer.fout[0].tell())
    writer.fout[0].truncate(writer.fout[0].tell() + size)
    writer.close()


if __name__ == "__main__":
    main()
