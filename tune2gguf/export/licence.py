"""The licence of a base model, and what it asks of whoever passes a fine-tune on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

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
        identifier: as model cards name it (`apache-2.0`, `llama3.2`), or None where it is not known
        duties: what the licence asks of a fine-tune that is passed on, for the model card
        text: for the Modelfile's LICENSE, or None where the licence needs no copy there
    """

    identifier: str | None
    duties: str
    text: str | None


def find_licence(base_dir: Path, *, base_name: str, is_llama3: bool) -> Licence:
    """Find the licence from the base folder's files and the base's name.

    Args:
        base_name: where the base came from, such as `meta-llama/Llama-3.2-1B-Instruct`
        is_llama3: whether it has Llama 3's tokenizer and chat template
    """
    text = next((_read_text(base_dir / name) for name in _LICENCE_FILES if (base_dir / name).is_file()), None)
    version = _find_llama_version(base_name, text or "")
    if is_llama3 or version is not None:
        shown = version or "3"
        notice = _LLAMA_NOTICE.format(version=shown)
        identifier = f"llama{shown}"
        return Licence(identifier, _LLAMA_DUTIES.format(version=shown, notice=notice), notice if text is None else text)
    identifier = _read_card_licence(base_dir / "README.md")
    if identifier is None and "smollm2" in base_name.lower():
        identifier = "apache-2.0"
    if identifier is None:
        return Licence(None, "The licence of the base model applies; it was not found beside the base.", text)
    return Licence(identifier, f"The base model's licence applies: {identifier}.", text)


def _find_llama_version(base_name: str, text: str) -> str | None:
    found = re.search(r"llama[-_ ]?(3(?:\.\d)?)", base_name, re.IGNORECASE) or re.search(
        r"LLAMA (3(?:\.\d)?) COMMUNITY LICENSE", text, re.IGNORECASE
    )
    return found[1] if found else None


def _read_card_licence(path: Path) -> str | None:
    """Return `license` from the front matter of a model card."""
    if not path.is_file():
        return None
    front = re.match(r"---\n(.*?)\n---", _read_text(path), re.DOTALL)
    found = re.search(r"^license:\s*[\"']?([\w.\-]+)", front[1], re.MULTILINE) if front else None
    return found[1] if found else None


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
