"""Answer general prompts with a run's base, and write them as rows to mix in."""

from __future__ import annotations

import argparse

from tune2gguf.commands import expand_path
from tune2gguf.runs.run import open_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=expand_path, help="folder of a run, such as runs/quickstart")
    parser.add_argument("--base-dir", type=expand_path, help="the base folder, if it has moved since the run")
    arguments = parser.parse_args()
    run = open_run(arguments.run, base_dir=arguments.base_dir)

    from tune2gguf.serve.general_rows import make_general_rows

    path, num_rows, num_left_out = make_general_rows(run)
    print(f"wrote {path}: {num_rows} rows; {num_left_out} prompts left out because their answers were cut")
