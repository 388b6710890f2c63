"""Measure how often sampled replies to validation prompts equal the greedy ones, by temperature.

    python benchmarks/sampling.py runs/quickstart --record benchmarks/results/sampling_quickstart.txt

The proof is greedy: this is the share of proven replies that a user gets. Sampling is otherwise neutral, as in the
Modelfile. Besides whole replies, their figures are compared: times, prices, counts.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from tune2gguf.export.folder import find_newest_gguf
from tune2gguf.runs.run import open_run
from tune2gguf.runs.validation_rows import read_validation_rows
from tune2gguf.serve.llama_cpp import LlamaCppModel, open_model
from tune2gguf.tokenizer.conversation import cut_before_reply, make_request_messages

TEMPERATURES = (0.0, 0.3, 0.7, 1.0)
MAX_REPLY_TOKENS = 100


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--replies", type=int, default=5, help="replies per prompt at each temperature above 0")
    parser.add_argument("--record", type=Path)
    return parser.parse_args()


def find_figures(reply: str) -> list[str]:
    return re.findall(r"\d[\d:.,]*", reply)


def measure(model: LlamaCppModel, prompts: list[list[dict]], *, num_replies: int) -> list[str]:
    """Return a line per temperature: replies, share with the greedy words, share with the greedy figures."""
    greedy = [model.chat(prompt, max_tokens=MAX_REPLY_TOKENS).text.split() for prompt in prompts]
    lines = ["temperature  replies  same words  same figures"]
    for temperature in TEMPERATURES:
        same_words, same_figures = [], []
        for prompt, words in zip(prompts, greedy, strict=True):
            for seed in range(num_replies if temperature > 0 else 1):
                reply = model.chat(prompt, max_tokens=MAX_REPLY_TOKENS, temperature=temperature, seed=seed).text.split()
                same_words.append(reply == words)
                figures = find_figures(" ".join(words))
                if figures:
                    same_figures.append(find_figures(" ".join(reply)) == figures)
        shares = [sum(one) / len(one) for one in (same_words, same_figures)]
        lines.append(f"{temperature:11g} {len(same_words):8} {shares[0]:11.0%} {shares[1]:13.0%}")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    arguments = parse_arguments()
    run = open_run(arguments.run)
    path = find_newest_gguf(run)
    conversations = [one for one in read_validation_rows(run.run_dir) if one.messages]
    prompts = [make_request_messages(cut_before_reply(one).messages) for one in conversations]
    model = open_model(path, context_length=run.max_seq_len + MAX_REPLY_TOKENS)
    head = f"{path.name}, {len(prompts)} validation prompts, {arguments.replies} replies to each above temperature 0"
    lines = [head, *measure(model, prompts, num_replies=arguments.replies)]
    print("\n".join(lines))
    if arguments.record is not None:
        arguments.record.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
