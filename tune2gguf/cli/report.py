"""Write a run's report.html again from its folder, and print the verdict and the next command."""

from __future__ import annotations

import argparse

from tune2gguf.commands import expand_path
from tune2gguf.report import write_report
from tune2gguf.verdict.conclude import recall_verdict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "run", type=expand_path, help="folder of a run, such as runs/quickstart; it may still be running"
    )
    arguments = parser.parse_args()
    path = write_report(arguments.run)
    print("\n".join([*recall_verdict(arguments.run), f"wrote {path}"]))
