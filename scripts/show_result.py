"""Show what a run changed: validation loss and llama.cpp's answers to validation questions, before and after."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tune2gguf.files.output import run_program
from tune2gguf.serve.before_after import answer_before_and_after, read_validation_losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of an exported run, such as runs/quickstart")
    parser.add_argument("--gguf", type=Path, help="default: the newest in the run's export folder")
    parser.add_argument("--questions", type=int, default=3, help="validation questions to ask")
    arguments = parser.parse_args()
    files = sorted(arguments.run.glob("export/*.gguf"), key=lambda path: path.stat().st_mtime)
    if arguments.gguf is None and not files:
        sys.exit(f"error: {arguments.run}/export has no GGUF yet. First: python scripts/export.py {arguments.run}")
    gguf_path = arguments.gguf or files[-1]
    before, after = read_validation_losses(arguments.run)
    answers = answer_before_and_after(arguments.run, gguf_path, num_questions=arguments.questions)
    print(f"validation loss: {before:.3f} → {after:.3f} ({after / before - 1:+.0%})")
    for answer in answers:
        print(f"\nQ       {answer.question}\n  base  {_join(answer.before)}\n  tuned {_join(answer.after)}")


def _join(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    with run_program():
        main()
