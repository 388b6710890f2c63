"""Several runs of the recipe in the same processes, which start, import torch and connect once.

torchrun --standalone --nproc-per-node N tests/recipes/several_runs.py RUNS.json

RUNS.json has lists of arguments: a run in `alone` has one process, a run in `together` has all.
"""

import gc
import json
import os
import sys
from pathlib import Path

from recipes.lora_finetune import LoRAFinetuneRecipe
from tune2gguf.config import check_config, load_config


def run(arguments: list[str]) -> None:
    cfg = load_config(arguments)
    recipe = LoRAFinetuneRecipe(cfg, check_config(cfg))
    recipe.setup()
    recipe.train()
    recipe.save()
    # Release other processes' memory before they reuse it for the next run.
    del recipe
    gc.collect()


def main() -> None:
    runs = json.loads(Path(sys.argv[1]).read_text())
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ["WORLD_SIZE"] = "1"
    for arguments in runs["alone"][rank::size]:
        run(arguments)
    os.environ["WORLD_SIZE"] = str(size)
    for arguments in runs["together"]:
        run(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # like the recipe with several processes


if __name__ == "__main__":
    main()
