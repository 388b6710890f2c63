"""Train with a config, one of your own or one that comes with the package.

tune2gguf run --config configs/llama3_2_1b/lora.yaml dataset.files=[my.jsonl]
tune2gguf run --nproc_per_node 8 --config configs/llama3_1_8b/lora.yaml      torchrun's options come before --config
"""

from __future__ import annotations

import runpy
import sys

from tune2gguf.commands import RECIPE, find_config, find_shipped


def main() -> None:
    launcher, words = split_arguments(sys.argv[1:])
    if "--help" in launcher or "-h" in launcher or not words:
        print(__doc__)
        sys.exit(0 if words or launcher else 2)
    recipe = str(find_shipped(RECIPE))
    if launcher:
        from torch.distributed.run import main as start_processes

        start_processes([*launcher, recipe, *words])
        return
    sys.argv = [recipe, *words]
    runpy.run_path(recipe, run_name="__main__")


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return torchrun's options and the recipe's arguments: --config and all after it, and every KEY=VALUE."""
    words = ["--config", *words[0].split("=", 1)[1:], *words[1:]] if (words := _from_config(arguments)) else []
    before = arguments[: len(arguments) - len(_from_config(arguments))]
    if len(words) > 1:
        words[1] = str(find_config(words[1]))
    overrides = [word for word in before if "=" in word and not word.startswith("-")]
    return [word for word in before if word not in overrides], [*words, *overrides]


def _from_config(arguments: list[str]) -> list[str]:
    at = (n for n, word in enumerate(arguments) if word == "--config" or word.startswith("--config="))
    return arguments[next(at, len(arguments)) :]
