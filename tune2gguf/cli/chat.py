"""Talk to a run's exported model: tune2gguf chat runs/NAME"""

from __future__ import annotations

import argparse
import sys

from tune2gguf.commands import expand_path
from tune2gguf.runs.run import open_run
from tune2gguf.serve.chat import check_options, open_chat_model, start_conversation, talk


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=expand_path, help="folder of an exported run, such as runs/quickstart")
    parser.add_argument("--once", metavar="QUESTION", help="print one reply and end")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--adapter", action="store_true", help="use base and adapter in torch, not the exported file")
    asked.add_argument("--adapter-gguf", action="store_true", help="use base and adapter of Modelfile-adapter")
    asked.add_argument("--gguf", type=expand_path, help="default: the newest in the run's export folder")
    parser.add_argument("--base-dir", type=expand_path, help="the base folder, if it has moved since the run")
    parser.add_argument("--system", help="system prompt; default: the one that all training rows share")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 always takes the most probable token")
    parser.add_argument("--max-tokens", type=int, default=256, help="maximum tokens per reply")
    parser.add_argument(
        "--threads", type=int, help="llama.cpp's threads, at most the free cores; default: by the file's size"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    options = {"max_tokens": arguments.max_tokens, "temperature": arguments.temperature}
    try:
        check_options(**options, num_threads=arguments.threads)
        if arguments.once is not None and not arguments.once.strip():
            raise ValueError("--once is empty; give it a question")
        run = open_run(arguments.run, base_dir=arguments.base_dir)
        model = open_chat_model(
            run,
            gguf_path=arguments.gguf,
            uses_adapter=arguments.adapter,
            uses_adapter_gguf=arguments.adapter_gguf,
            num_threads=arguments.threads,
        )
        system_prompt = run.system_prompt if arguments.system is None else arguments.system
        if arguments.once is not None:
            messages = [*start_conversation(system_prompt), {"role": "user", "content": arguments.once}]
            model.chat(messages, on_text=show, **options)
            print()
            return
        talk(model, system_prompt=system_prompt, read_line=lambda: input("> "), write=show, **options)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print()


def show(text: str) -> None:
    print(text, end="", flush=True)
