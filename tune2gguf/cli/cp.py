"""Copy a file or folder that comes with the package: tune2gguf cp configs/llama3_2_1b/lora.yaml ."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path, PurePosixPath

from tune2gguf.commands import expand_path, find_shipped, list_shipped
from tune2gguf.files.atomic import refuse_existing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", help="one of `tune2gguf ls`, or its folder")
    parser.add_argument(
        "destination", type=expand_path, nargs="?", default=Path(), help="file or folder; default: here"
    )
    parser.add_argument("--force", action="store_true", help="replace what is there")
    arguments = parser.parse_args()
    names = [path.as_posix() for path in list_shipped()]
    names += dict.fromkeys(str(PurePosixPath(name).parent) for name in names)
    if arguments.file not in names:
        raise ValueError(f"{arguments.file!r} does not come with the package; these do:\n  " + "\n  ".join(names))
    source, target = find_shipped(arguments.file), arguments.destination
    target = target / source.name if target.is_dir() else target
    if not arguments.force:
        refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copyfile(source, target)
    print(target)
