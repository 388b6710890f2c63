"""Write report.html of a run again, from what its folder holds, and say the verdict and the next command."""

from __future__ import annotations

import argparse
import sys

from tune2gguf.commands import expand_path
from tune2gguf.files.output import accept_any_text
from tune2gguf.report import write_report
from tune2gguf.verdict.conclude import recall_verdict


def main() -> None:
    accept_any_text()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "run", type=expand_path, help="folder of a run, such as runs/quickstart; it may still be running"
    )
    arguments = parser.parse_args()
    try:
        path = write_report(arguments.run)
        print("\n".join([*recall_verdict(arguments.run), f"wrote {path}"]))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
