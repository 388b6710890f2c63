"""Where a base comes from, and what it is called."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tune2gguf.base.pypi import SMOLLM2_GGUF

HUB_SCHEME, PYPI_SCHEME = "hf://", "pypi://"
# GGUFs in PyPI packages that can become a base.
PYPI_BASES = {file.wheel: file for file in (SMOLLM2_GGUF,)}


@dataclass(frozen=True)
class BaseSource:
    """Where a base comes from: a hub repository with its revision (None is the newest), or a PyPI package."""

    scheme: str
    name: str
    revision: str | None = None


def parse_base_source(text: str) -> BaseSource:
    """Parse `hf://OWNER/NAME`, `hf://OWNER/NAME@REVISION` or `pypi://PACKAGE==VERSION`.

    Raises:
        ValueError: if it is none of them
    """
    if text.startswith(HUB_SCHEME):
        repo, _, revision = text.removeprefix(HUB_SCHEME).partition("@")
        if repo.count("/") == 1 and all(repo.split("/")):
            return BaseSource(HUB_SCHEME, repo, revision if revision else None)
    elif text.startswith(PYPI_SCHEME):
        package = text.removeprefix(PYPI_SCHEME)
        if package in PYPI_BASES:
            return BaseSource(PYPI_SCHEME, package)
        raise ValueError(f"base_source={text!r}: no base is known in this package; known: {', '.join(PYPI_BASES)}")
    raise ValueError(
        f"base_source={text!r}: expected hf://OWNER/NAME, hf://OWNER/NAME@REVISION or pypi://PACKAGE==VERSION"
    )


def name_base(base_source: str | None, base_dir: str | Path) -> str:
    """Return the name by which peft, transformers and model cards find a base: its hub repository, else its folder."""
    if base_source is not None and base_source.startswith(HUB_SCHEME):
        return base_source.removeprefix(HUB_SCHEME).partition("@")[0]
    return str(base_dir)
