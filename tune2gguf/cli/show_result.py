"""Show what a run changed: validation loss and llama.cpp's answers to validation questions, before and after."""

from __future__ import annotations

import argparse

from tune2gguf.commands import expand_path
from tune2gguf.serve.before_after import answer_before_and_after, read_validation_losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=expand_path, help="folder of an exported run, such as runs/quickstart")
    parser.add_argument("--gguf", type=expand_path, help="default: the newest in the run's export folder")
    parser.add_argument("--questions", type=int, default=3, help="validation questions to ask")
    arguments = parser.parse_args()
    before, after = read_validation_losses(arguments.run)
    answers = answer_before_and_after(arguments.run, gguf_path=arguments.gguf, num_questions=arguments.questions)
    print(f"validation loss: {before:.3f} → {after:.3f} ({after / before - 1:+.0%})")
    for answer in answers:
        print(f"\nQ       {answer.question}\n  base  {_join(answer.before)}\n  tuned {_join(answer.after)}")


def _join(text: str) -> str:
    return " ".join(text.split())
