"""Conversion of a small Llama's GGUF into a base folder: dequantized weights, rebuilt tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import TokenType

from tune2gguf.base.digest import RECORD_FILE
from tune2gguf.base.gguf_weights import StoredGguf, list_stored, read_gguf_architecture, read_keys
from tune2gguf.base.layout import ROPE_FACTORS, TensorSpec, get_gguf_name, list_tensors, to_hf_rows
from tune2gguf.base.safetensors_file import TensorToWrite, write_shards
from tune2gguf.files.atomic import refuse_existing, write_folder, write_json
from tune2gguf.files.digest import digest_file
from tune2gguf.model.architectures import Architecture, make_hf_config

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

DTYPES = {"bfloat16": "BF16", "float32": "F32"}


def convert_gguf_to_hf(
    gguf_path: str | Path, base_dir: str | Path, *, dtype: str = "bfloat16", source: str | None = None
) -> Path:
    """Write a base folder from a GGUF of llama architecture, and return it; the folder appears whole or not at all.

    The folder, not the GGUF, is the base for training, export and comparisons. Dequantized values (scale times code,
    plus minimum) are float32. bfloat16 halves disk and memory; it rounds each value once, to nearest even, by at most
    2^-8 of its size.

    Args:
        dtype: dtype of the weights, `bfloat16` or `float32`
        source: origin of the GGUF, for the folder's base.json; None records the file's name

    Raises:
        ValueError: if the folder exists, or the GGUF cannot be read, has another architecture, RoPE scaling (a GGUF
            lacks its parameters), another tokenizer than SmolLM2's, or missing tensors
    """
    gguf_path, base_dir = Path(gguf_path), Path(base_dir)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; choose from {', '.join(DTYPES)}")
    refuse_existing(base_dir)
    keys, tensors = read_keys(gguf_path), list_stored(gguf_path)
    architecture = read_gguf_architecture(gguf_path)
    if ROPE_FACTORS in tensors:
        raise ValueError(f"{gguf_path}: RoPE scaling is not supported; use the model's Hugging Face checkpoint instead")
    tokenizer = _build_tokenizer(keys, gguf_path)
    specs = list_tensors(architecture)
    _check_tensors(specs, tensors, gguf_path)
    with write_folder(base_dir) as folder:
        to_write = [TensorToWrite(spec.hf_name, DTYPES[dtype], spec.shape) for spec in specs]
        chunks = _dequantize(specs, tensors, dtype)
        write_shards(folder, to_write, chunks, max_shard_bytes=5_000_000_000)
        tokenizer.save(str(folder / "tokenizer.json"))
        for name, content in _make_configs(keys, architecture, dtype).items():
            write_json(folder / name, content)
        digests = {path.name: digest_file(path) for path in sorted(folder.iterdir())}
        origin = gguf_path.name if source is None else source
        record = {"source": origin, "gguf_sha256": digest_file(gguf_path), "sha256": digests}
        write_json(folder / RECORD_FILE, record)
    return base_dir


def _check_tensors(specs: list[TensorSpec], tensors: dict[str, StoredGguf], gguf_path: Path) -> None:
    missing = [name for name in (get_gguf_name(spec.tune_name) for spec in specs) if name not in tensors]
    if missing:
        raise ValueError(f"{gguf_path}: lacks {len(missing)} tensors, among them {missing[0]!r}")
    for spec in specs:
        tensor = tensors[get_gguf_name(spec.tune_name)]
        if tensor.shape != spec.shape:
            raise ValueError(
                f"{gguf_path}: {tensor.name!r} has shape {list(tensor.shape)}, its keys give {list(spec.shape)}"
            )


def _dequantize(specs: list[TensorSpec], tensors: dict[str, StoredGguf], dtype: str) -> Iterator[Tensor]:
    import torch

    for spec in specs:
        tensor = tensors[get_gguf_name(spec.tune_name)]
        weight = torch.from_numpy(tensor.read_rows(0, spec.shape[0]))
        yield (weight if spec.num_heads is None else to_hf_rows(weight, spec.num_heads)).to(getattr(torch, dtype))


def _build_tokenizer(keys: dict[str, Any], gguf_path: Path) -> Tokenizer:
    """Rebuild tokenizer.json from vocabulary and merges, with llama.cpp's pre-tokenizer for `smollm`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    if (keys.get("tokenizer.ggml.model"), keys.get("tokenizer.ggml.pre")) != ("gpt2", "smollm"):
        raise ValueError(
            f"{gguf_path}: tokenizer.ggml.pre is {keys.get('tokenizer.ggml.pre')!r}; only 'smollm' is supported"
        )
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens) if types[token_id] != TokenType.UNUSED}
    merges = [tuple(merge.split(" ")) for merge in keys["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=token_type == TokenType.CONTROL)
            for token, token_type in zip(tokens, types, strict=True)
            if token_type in (TokenType.CONTROL, TokenType.USER_DEFINED)
        ]
    )
    return tokenizer


def _make_configs(keys: dict[str, Any], architecture: Architecture, dtype: str) -> dict[str, dict]:
    token_ids = {
        f"{role}_token_id": keys[f"tokenizer.ggml.{gguf_role}_token_id"]
        for role, gguf_role in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
        if f"tokenizer.ggml.{gguf_role}_token_id" in keys
    }
    tokens = {name.removesuffix("_id"): keys["tokenizer.ggml.tokens"][value] for name, value in token_ids.items()}
    token_ids.pop("unk_token_id", None)  # belongs to the tokenizer only
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": architecture.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        **tokens,
    }
    if "tokenizer.chat_template" in keys:
        tokenizer_config["chat_template"] = keys["tokenizer.chat_template"]
    return {
        "config.json": make_hf_config(architecture) | token_ids | {"torch_dtype": dtype},
        "generation_config.json": token_ids,
        "tokenizer_config.json": tokenizer_config,
    }
