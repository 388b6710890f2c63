"""Base folders with random weights, of any Llama shape: for tests of memory, speed and export without a download."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from tune2gguf.base.bnb4bit import QUANTIZATION_CONFIG, encode_nf4, list_nf4_tensors
from tune2gguf.base.digest import RECORD_FILE
from tune2gguf.base.layout import TensorSpec, list_tensors
from tune2gguf.base.safetensors_file import TensorToWrite, write_shards
from tune2gguf.files.atomic import write_folder, write_json
from tune2gguf.model.architectures import Architecture, make_hf_config
from tune2gguf.tokenizer.llama3 import make_llama3_tokenizer_json

# Kind of base -> dtype of its unquantized weights.
KINDS = {"bf16": "BF16", "float32": "F32", "bnb-4bit": "BF16"}
INIT_STD = 0.02  # Llama's initializer_range
MAX_CHUNK_ELEMENTS = 1 << 24
MAX_SHARD_BYTES = 5_000_000_000  # as Hugging Face's writers
LLAMA3_VOCAB_SIZE = 128_256


def write_random_base(
    architecture: Architecture,
    base_dir: str | Path,
    *,
    kind: str = "bf16",
    seed: int = 0,
    tokenizer_model: Path | None = None,
    as_tokenizer_json: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    device: str = "cpu",
) -> Path:
    """Write a base folder with normal weights (standard deviation 0.02) and norms of 1.

    Its loss is near ln(vocab_size). Weights are drawn and written one slab of rows at a time: memory stays under
    0.5 GB at any model size.

    Args:
        kind: `bf16`, `float32`, or `bnb-4bit` (layers' matrices in bitsandbytes' NF4, the rest in bf16)
        tokenizer_model: Llama 3's tokenizer.model, copied to `original/` as in Meta's repositories
        as_tokenizer_json: convert it to tokenizer.json instead, as in the hub's repositories
        device: device that draws the weights; a GPU is faster and draws other values

    Raises:
        ValueError: if the folder exists or the kind is unknown
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; choose from {', '.join(KINDS)}")
    base_dir = Path(base_dir)
    with write_folder(base_dir) as folder:
        _write_weights(folder, architecture, kind=kind, seed=seed, max_shard_bytes=max_shard_bytes, device=device)
        write_json(folder / RECORD_FILE, {"source": "random weights", "kind": kind, "seed": seed})
        _write_configs(folder, architecture, kind)
        if tokenizer_model is not None:
            _write_tokenizer(folder, tokenizer_model, as_json=as_tokenizer_json)
    return base_dir


def _write_weights(
    folder: Path, architecture: Architecture, *, kind: str, seed: int, max_shard_bytes: int, device: str
) -> None:
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    generator = torch.Generator(device).manual_seed(seed)
    tensors, chunks = [], []
    for spec in list_tensors(architecture):
        rows = (chunk.to(dtype).cpu() for chunk in _draw_rows(spec, generator))
        if kind == "bnb-4bit" and spec.is_linear:
            tensors += list_nf4_tensors(spec.hf_name, spec.shape)
            rows = encode_nf4(rows, spec.shape, dtype="bfloat16")
        else:
            tensors.append(TensorToWrite(spec.hf_name, KINDS[kind], spec.shape))
        chunks.append(rows)
    write_shards(folder, tensors, itertools.chain.from_iterable(chunks), max_shard_bytes=max_shard_bytes)


def _write_tokenizer(folder: Path, tokenizer_model: Path, *, as_json: bool) -> None:
    if as_json:
        # Equals the published file, byte for byte.
        text = json.dumps(make_llama3_tokenizer_json(tokenizer_model), indent=2, ensure_ascii=False)
        (folder / "tokenizer.json").write_text(text, encoding="utf-8", newline="\n")
    else:
        (folder / "original").mkdir()
        shutil.copyfile(tokenizer_model, folder / "original" / "tokenizer.model")


def _draw_rows(spec: TensorSpec, generator: torch.Generator) -> Iterator[Tensor]:
    if len(spec.shape) == 1:
        yield torch.ones(spec.shape)
        return
    num_rows, num_columns = spec.shape
    # A multiple of 64 rows: every chunk has whole NF4 blocks, whatever the number of columns.
    rows_per_chunk = max(64, MAX_CHUNK_ELEMENTS // num_columns // 64 * 64)
    for begin in range(0, num_rows, rows_per_chunk):
        chunk = torch.empty(min(rows_per_chunk, num_rows - begin), num_columns, device=generator.device)
        yield chunk.normal_(std=INIT_STD, generator=generator)


def _write_configs(folder: Path, architecture: Architecture, kind: str) -> None:
    dtype = "float32" if kind == "float32" else "bfloat16"
    config = make_hf_config(architecture) | {"initializer_range": INIT_STD, "torch_dtype": dtype}
    if kind == "bnb-4bit":
        config["quantization_config"] = QUANTIZATION_CONFIG
    generation_config = {}
    if architecture.vocab_size == LLAMA3_VOCAB_SIZE:
        # As in Meta's repositories: <|begin_of_text|>; <|end_of_text|>, <|eom_id|>, <|eot_id|>.
        token_ids = {"bos_token_id": 128_000, "eos_token_id": [128_001, 128_008, 128_009]}
        config |= token_ids
        generation_config = token_ids | {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    for name, content in (("config.json", config), ("generation_config.json", generation_config)):
        write_json(folder / name, content)
