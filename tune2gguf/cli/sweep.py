"""Run a config with each combination of values and rank the runs by validation loss. Run again to continue.

tune2gguf sweep --config examples/quickstart/lora.yaml learning_rate=5e-4,1e-3,2e-3 lora_alpha=16,32 epochs=2
"""

import argparse
from pathlib import Path

from tune2gguf.commands import expand_path, find_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=find_config, required=True)
    parser.add_argument("--out", type=expand_path, default=Path("runs/sweep"), metavar="DIR", help="the sweep's folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value[,value…]", help="comma-separated values are swept")
    arguments = parser.parse_intermixed_args()

    from tune2gguf.sweep import list_points, rank_points, run_sweep

    points = list_points(arguments.overrides, arguments.out)
    run_sweep(arguments.config, points)
    print(rank_points(points))
