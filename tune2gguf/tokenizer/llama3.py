"""Llama 3's tokenizer: its special tokens, and tokenizer.json made from Meta's tokenizer.model."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from contextlib import suppress
from pathlib import Path

from tune2gguf.files.atomic import write_text
from tune2gguf.files.cache import get_cache_dir

# The pattern in Meta's published tokenizer of Llama 3.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NUM_LLAMA3_SPECIAL_TOKENS = 256
# Names by offset from the first special id, as published with Llama 3.1 and 3.2; the rest are reserved.
_LLAMA3_SPECIAL_TOKENS = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    2: "<|reserved_special_token_0|>",
    3: "<|reserved_special_token_1|>",
    4: "<|finetune_right_pad_id|>",
    5: "<|reserved_special_token_2|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}


def read_llama3_tokenizer_json(path: str | Path) -> str:
    """Return the text of the tokenizer.json that is made below, kept in the cache folder for the next start.

    Raises:
        ValueError: as make_llama3_tokenizer_json
    """
    entry = get_cache_dir() / "tokenizers" / f"{_digest(Path(path).read_bytes())}.json"
    with suppress(OSError, ValueError):  # nothing there, or nothing that can be read
        digest, text = entry.read_text(encoding="utf-8").split("\n", maxsplit=1)
        if digest == _digest(text.encode()):
            return text
    text = json.dumps(make_llama3_tokenizer_json(path), ensure_ascii=False)
    with suppress(OSError):  # a cache that cannot be written to costs time only
        entry.parent.mkdir(parents=True, exist_ok=True)
        write_text(entry, f"{_digest(text.encode())}\n{text}")
    return text


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def make_llama3_tokenizer_json(path: str | Path) -> dict:
    """Return the content of the published tokenizer.json of Llama 3.1 and 3.2, made from Meta's tokenizer.model.

    Each line of tokenizer.model holds a token's bytes in base64 and its rank, which is its id. Written with
    `json.dumps(…, indent=2, ensure_ascii=False)` the result is the published file, byte for byte.

    Raises:
        ValueError: if the file is not in that format (Llama 2's tokenizer.model, a SentencePiece file, is not)
    """
    ranks = _read_ranks(Path(path))
    characters = _make_byte_characters()
    spell = {token: "".join(characters[byte] for byte in token) for token in ranks}
    special_tokens = [
        _LLAMA3_SPECIAL_TOKENS.get(offset, f"<|reserved_special_token_{offset - 8}|>")
        for offset in range(NUM_LLAMA3_SPECIAL_TOKENS)
    ]
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": len(ranks) + offset,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for offset, token in enumerate(special_tokens)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": _make_llama3_post_processor(len(ranks)),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {spell[token]: rank for token, rank in ranks.items()},
            "merges": [[spell[left], spell[right]] for left, right in _recover_merges(ranks)],
        },
    }


def _make_llama3_post_processor(bos_id: int) -> dict:
    bos = "<|begin_of_text|>"

    def special(type_id: int) -> dict:
        return {"SpecialToken": {"id": bos, "type_id": type_id}}

    def sequence(name: str, type_id: int) -> dict:
        return {"Sequence": {"id": name, "type_id": type_id}}

    template = {
        "type": "TemplateProcessing",
        "single": [special(0), sequence("A", 0)],
        "pair": [special(0), sequence("A", 0), special(1), sequence("B", 1)],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    return {"type": "Sequence", "processors": [byte_level, template]}


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Return rank by token, in the order of the file."""
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"{path}, line {number}: not a tokenizer.model of Llama 3 (expected a token in base64 and its rank)"
            ) from None
    if list(ranks.values()) != list(range(len(ranks))) or not ranks:
        raise ValueError(f"{path}: its ranks are not 0, 1, 2, …; the file is damaged, so download it again")
    return ranks


def _recover_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return all pairs of tokens that join to a token, sorted by rank of the whole, the left and the right part."""
    merges = []
    for token in ranks:  # in the order of their ranks
        pairs = [
            (left, right)
            for cut in range(1, len(token))
            if (left := token[:cut]) in ranks and (right := token[cut:]) in ranks
        ]
        if len(pairs) > 1:
            pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += pairs
    return merges


def _make_byte_characters() -> dict[int, str]:
    """Return the printable character that stands for each byte in a byte-level vocabulary (GPT-2's convention)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}
