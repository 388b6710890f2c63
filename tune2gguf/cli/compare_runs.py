"""Compare runs: a table of what differs, validation loss, time, memory and verdict, and a page with the curves."""

import argparse
from pathlib import Path

from tune2gguf.commands import expand_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", type=expand_path, help="folders of runs; default: all in runs/")
    parser.add_argument(
        "--html", type=expand_path, default=Path("runs/comparison.html"), metavar="PATH", help="path of the page"
    )
    arguments = parser.parse_args()

    from tune2gguf.report.compare import find_runs, format_groups, group_runs, write_comparison

    groups = group_runs(arguments.runs or find_runs(Path("runs")))
    print(format_groups(groups))
    print(write_comparison(groups, arguments.html))
