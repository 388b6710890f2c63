"""List the files of the package: the recipe, and the configs that `tune2gguf run --config` takes by name."""

from __future__ import annotations

import argparse

from tune2gguf.commands import list_shipped


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    print("\n".join(map(str, list_shipped())))
