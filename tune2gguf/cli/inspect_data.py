"""Look at data before training: rows, tokens, and which tokens are supervised.

tune2gguf inspect --config configs/llama3_2_1b/lora.yaml dataset.files=[my.jsonl]
tune2gguf inspect my.jsonl --base-dir models/Llama-3.2-1B-Instruct --chat-template llama3
"""

from __future__ import annotations

import argparse
import os
import sys

from tune2gguf.commands import expand_path, find_config
from tune2gguf.inspect_data import check_outputs, inspect_config, inspect_files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "arguments", nargs="*", help="data files, dataset.KEY=VALUE, seed=N; with --config, any KEY=VALUE"
    )
    parser.add_argument("--config", type=find_config, help="a run's YAML, with data, tokenizer and rows per step")
    parser.add_argument("--base-dir", type=expand_path, help="without --config: the base folder with the tokenizer")
    parser.add_argument("--chat-template", default="llama3", help="without --config: llama3 | llama3_1 | chatml")
    parser.add_argument("--max-seq-len", type=int, default=2048, help="without --config: tokens kept per row")
    parser.add_argument("--rows", type=int, default=3, help="rows to print with their supervised tokens coloured")
    parser.add_argument("--html", type=expand_path, help="also write a page, to a new file")
    parser.add_argument("--png", type=expand_path, help="also write the histogram as a picture, to a new file")
    arguments = parser.parse_intermixed_args()
    if (arguments.config is None) == (arguments.base_dir is None):
        parser.error("give either --config, or data files and --base-dir")
    check_outputs(arguments.html, arguments.png)
    if arguments.config is not None:
        inspection = inspect_config(arguments.config, arguments.arguments, num_rows=arguments.rows)
    else:
        inspection = inspect_files(
            arguments.arguments,
            arguments.base_dir,
            chat_template=arguments.chat_template,
            max_seq_len=arguments.max_seq_len,
            num_rows=arguments.rows,
        )
    print(inspection.format(colored=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    if arguments.html is not None:
        print(f"\nwrote {inspection.write_html(arguments.html)}")
    if arguments.png is not None:
        print(f"wrote {inspection.write_png(arguments.png)}")
