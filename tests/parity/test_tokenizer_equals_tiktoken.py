"""Our Llama 3 tokenizer equals Meta's: tiktoken with the same tokenizer.model gives the same ids."""

from functools import cache
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.tokenizer_files import find_llama3_tokenizer, load_llama3, make_random_texts
from tune2gguf.tokenizer.llama3 import LLAMA3_PATTERN, NUM_LLAMA3_SPECIAL_TOKENS

HAND_WRITTEN = [
    "I'll say it's WE'VE 'S 'tis o'clock",
    "1 12 123 1234 12345678 3.14 1,000,000 ٣٤٥ Ⅻ ½",
    "def f(x):\n    return {'a': x}\n\n\tif x:\r\n\t\tpass   \n",
    "  two  three   trailing   ",
    "\n\n\n  \n\t\n",
    "日本語のテキスト。中文文本！한국어 텍스트?",
    "Русский, Ελληνικά, עברית, العربية, हिन्दी, ไทย",
    "👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \ufeff\u200b\u00ad",
    "http://example.org/a_b?c=d&e=%20 <b>x</b> $$ ### --- ...",
    "a\u00a0b\u3000c\u2028d\u0085e",
    "",
    " ",
    "x" * 3000,
]


@cache
def load_tiktoken():
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken.load import load_tiktoken_bpe

    path = find_llama3_tokenizer()
    ranks = load_tiktoken_bpe(str(path))
    special = {f"<|special_{index}|>": len(ranks) + index for index in range(NUM_LLAMA3_SPECIAL_TOKENS)}
    return tiktoken.Encoding("llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special)


def read_own_files() -> list[str]:
    paths = [*REPOSITORY.glob("tune2gguf/*.py"), *REPOSITORY.glob("examples/*/*.jsonl"), Path(__file__)]
    return [path.read_text(encoding="utf-8") for path in paths]


def test_ids_equal_tiktokens():
    texts = [*HAND_WRITTEN, *read_own_files(), *make_random_texts(5000)]
    ours, metas = load_llama3(), load_tiktoken()
    assert len(texts) > 5000
    different = [text for text in texts if ours.encode(text) != metas.encode_ordinary(text)]
    assert different == []


def test_every_token_of_the_vocabulary_decodes_to_tiktokens_bytes():
    """Tokens of whole characters are decoded one by one; encoding covers the others."""
    ours, metas = load_llama3(), load_tiktoken()
    for id_ in range(0, 128000, 7):
        text = metas.decode_bytes([id_]).decode("utf-8", errors="replace")
        if "\ufffd" not in text:
            assert ours.decode([id_]) == text


def test_another_pattern_gives_other_ids():
    """Negative control: GPT-2's splitting of numbers gives other ids on the same corpus."""
    import tiktoken

    pattern = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
    metas = load_tiktoken()
    other = tiktoken.Encoding("other", pat_str=pattern, mergeable_ranks=metas._mergeable_ranks, special_tokens={})
    assert [text for text in HAND_WRITTEN if load_llama3().encode(text) != other.encode_ordinary(text)]
