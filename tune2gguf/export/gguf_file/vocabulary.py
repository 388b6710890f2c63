"""The tokenizer as GGUF stores it, from tokenizer.json: tokens, their types, merges, special ids, pre-tokenizer.

Contents and order follow llama.cpp's converter (MIT: conversion/base.py, gguf-py/gguf/vocab.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import NoneType

from gguf import TokenType

from tune2gguf.base.gguf_weights import read_keys
from tune2gguf.files.json_files import JsonObject, read_json
from tune2gguf.tokenizer.llama3 import LLAMA3_PATTERN, read_llama3_tokenizer_json
from tune2gguf.tokenizer.templates import ChatTemplate
from tune2gguf.tokenizer.tokenizer import find_tokenizer_file, looks_special

LLAMA3_PRE_NAME = "llama-bpe"
_LLAMA3_PRE = [
    {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False},
    {"type": "ByteLevel", "use_regex": False},
]
_SMOLLM_PRE = [
    {"type": "Digits", "individual_digits": True},
    {"type": "ByteLevel", "use_regex": True},
]

_SAMPLING = {"top_p": "top_p", "min_p": "min_p", "temperature": "temp", "repetition_penalty": "penalty_repeat"}


@dataclass(frozen=True)
class Vocabulary:
    """The values of GGUF's tokenizer keys.

    Attributes:
        pre: llama.cpp's name of the pre-tokenizer
        special_ids: `bos`, `eos`, ... -> id, in the order of the file
        early_flags: `bos`, ... -> whether the runtime adds it, written before the chat template
        late_flags: the same, written after the chat template
    """

    tokens: list[str]
    token_types: list[int]
    merges: list[str]
    pre: str
    special_ids: dict[str, int]
    early_flags: dict[str, bool]
    late_flags: dict[str, bool]
    add_space_prefix: bool | None


def read_vocabulary(base_dir: str | Path, *, vocab_size: int, chat_template: ChatTemplate) -> Vocabulary:
    """Read the vocabulary of a base folder from tokenizer.json, or from Llama 3's tokenizer.model.

    Raises:
        ValueError: if there is no tokenizer, it is not supported, or it lacks the chat template's tokens
    """
    base_dir = Path(base_dir)
    source = find_tokenizer_file(base_dir)
    tokenizer = read_json(source) if source.suffix == ".json" else json.loads(read_llama3_tokenizer_json(source))
    tokenizer_config, hf_config = (read_if_there(base_dir / name) for name in ("tokenizer_config.json", "config.json"))
    with _explain_structure(source):
        pre = _identify_pre_tokenizer(tokenizer, source)
        tokens, token_types = _list_tokens(tokenizer, vocab_size, source)
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
        early_flags = _find_flags(tokenizer, tokenizer_config)
    ids = {token: number for number, token in enumerate(tokens)}
    wanted = [token for token in (chat_template.beginning, chat_template.end_of_turn) if token]
    missing = [token for token in wanted if token not in ids]
    if missing:
        raise ValueError(f"{source}: lacks {', '.join(missing)}, which chat template {chat_template.name!r} needs")
    # As in training: a conversation starts with one BOS if the template has a beginning, else with none.
    adds_bos = bool(chat_template.beginning)
    if "bos" in early_flags:
        early_flags["bos"] = adds_bos
    settings = JsonObject(base_dir / "tokenizer_config.json", tokenizer_config)
    if not isinstance(tokenizer_config.get("add_prefix_space"), (bool, NoneType)):
        settings.refuse("add_prefix_space", "it must be true or false")
    return Vocabulary(
        tokens=tokens,
        token_types=token_types,
        merges=merges,
        pre=pre,
        special_ids=_find_special_ids(ids, tokenizer, tokenizer_config, hf_config, chat_template),
        early_flags=early_flags,
        late_flags={} if "bos" in early_flags else {"bos": adds_bos},
        add_space_prefix=tokenizer_config.get("add_prefix_space"),
    )


def _identify_pre_tokenizer(tokenizer: dict, source: Path) -> str:
    """Return llama.cpp's name of the pre-tokenizer: Llama 3's or SmolLM2's."""
    model, pre = tokenizer["model"], tokenizer.get("pre_tokenizer") or {}
    parts = pre.get("pretokenizers", [pre])
    if model.get("type") == "BPE" and not tokenizer.get("normalizer") and not model.get("byte_fallback"):
        ignores_merges = bool(model.get("ignore_merges"))
        if _holds(parts, _LLAMA3_PRE) and ignores_merges:
            return LLAMA3_PRE_NAME
        if _holds(parts, _SMOLLM_PRE) and not ignores_merges:
            return "smollm"
    raise ValueError(
        f"{source}: this tokenizer is neither Llama 3's nor SmolLM2's, so llama.cpp would not split text as in "
        "training; use a base with one of these tokenizers"
    )


def _holds(parts: list[dict], expected: list[dict]) -> bool:
    """Return whether each part has the expected values and no space prefix; other keys are not compared."""
    if len(parts) != len(expected) or any(part.get("add_prefix_space") for part in parts):
        return False
    return all(wanted.items() <= part.items() for part, wanted in zip(parts, expected, strict=True))


def _list_tokens(tokenizer: dict, vocab_size: int, source: Path) -> tuple[list[str], list[int]]:
    tokens, token_types = [f"[PAD{number}]" for number in range(vocab_size)], [TokenType.UNUSED] * vocab_size
    vocab = tokenizer["model"]["vocab"]
    added = tokenizer.get("added_tokens", [])
    numbers = [*vocab.values(), *(token["id"] for token in added)]
    if max(numbers) >= vocab_size or min(numbers) < 0:
        wrong = max(numbers) if max(numbers) >= vocab_size else min(numbers)
        raise ValueError(f"{source}: has token id {wrong}, but config.json's vocab_size is {vocab_size}")
    for token, number in vocab.items():
        tokens[number], token_types[number] = token, TokenType.NORMAL
    for token in added:
        content = token["content"]
        is_control = looks_special(content) or token["special"]
        tokens[token["id"]] = content if is_control else content.replace("\u2581", " ")
        token_types[token["id"]] = TokenType.CONTROL if is_control else TokenType.USER_DEFINED
    return tokens, token_types


def _find_special_ids(
    ids: dict[str, int], tokenizer: dict, tokenizer_config: dict, hf_config: dict, chat_template: ChatTemplate
) -> dict[str, int]:
    """Return the ids of tokenizer_config.json's names, else of config.json; eos is the trained end of turn."""
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    kinds, found = ("bos", "eos", "unk", "sep", "pad", "mask"), {}
    for kind in kinds:
        entry = tokenizer_config.get(f"{kind}_token")
        content = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(content, str) and content in added:
            found[kind] = added[content]
    for kind in kinds:
        number = hf_config.get(f"{kind}_token_id")
        # Like the converter, skip invalid ids such as -1.
        if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(ids):
            found.setdefault(kind, number)
    if chat_template.beginning:
        found["bos"] = ids[chat_template.beginning]
    found["eos"] = ids[chat_template.end_of_turn]
    # A missing name must not move bos and eos behind the others.
    first = {kind: found.pop(kind) for kind in ("bos", "eos") if kind in found}
    return first | found


def _find_flags(tokenizer: dict, tokenizer_config: dict) -> dict[str, bool]:
    """Return the `add_..._token` flags that the converter writes before the chat template."""
    flags: dict[str, bool] = {}
    post = tokenizer.get("post_processor") or {}
    for part in post.get("processors", [post]):
        if part.get("type") == "ByteLevel":
            flags |= {"bos": False, "eos": False} | flags
        if part.get("type") == "TemplateProcessing":
            flags.setdefault("bos", False)
            if part.get("pair"):
                flags["sep"] = False
    for kind in ("bos", "eos", "unk", "sep", "pad", "mask"):
        value = tokenizer_config.get(f"add_{kind}_token")
        if isinstance(value, bool):
            flags.setdefault(kind, value)
    return flags


@contextmanager
def _explain_structure(path: Path) -> Iterator[None]:
    """Turn Python's errors on a malformed tokenizer.json into a one-line ValueError."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: not a valid tokenizer.json ({reason})") from None


def read_sampling(base_dir: Path) -> dict[str, float]:
    """Return the sampling parameters of the base's generation_config.json, by GGUF's names.

    Raises:
        ValueError: if a value is no number or out of range
    """
    path = base_dir / "generation_config.json"
    given = {key: value for key, value in read_if_there(path).items() if value is not None}
    config = JsonObject(path, given)
    found = {"top_k": config.read("top_k", int, minimum=-1, maximum=2**31 - 1, default=None)}
    for key, name in _SAMPLING.items():
        found[name] = config.read(key, float, minimum=0, maximum=3.4e38, default=None)
    return found


def check_gguf_vocabulary(path: Path, vocabulary: Vocabulary) -> None:
    """Raise ValueError if the ids in a GGUF mean other tokens than the base folder's."""
    keys = read_keys(path)
    wanted = {"tokens": vocabulary.tokens, "merges": vocabulary.merges, "pre": vocabulary.pre}
    for name, value in wanted.items():
        found = keys.get(f"tokenizer.ggml.{name}")
        if found != value:
            raise ValueError(
                f"{path}: tokenizer.ggml.{name} {_describe_difference(found, value)} in the base folder's tokenizer; "
                "take the tokenizer files of the GGUF's model"
            )


def _describe_difference(found: object, wanted: object) -> str:
    if not isinstance(found, list) or not isinstance(wanted, list):
        return f"is {found!r}, but {wanted!r}"
    if len(found) != len(wanted):
        return f"has {len(found)} entries, but {len(wanted)}"
    number = next(i for i, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pair[1])
    return f"has {found[number]!r} as entry {number}, but {wanted[number]!r}"


def read_if_there(path: Path) -> dict:
    """Return the JSON object of a file; {} if the file is missing."""
    return read_json(path) if path.is_file() else {}
