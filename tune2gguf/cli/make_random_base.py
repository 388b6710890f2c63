"""Write a base folder with a Llama architecture and random weights, to test memory and speed without a download."""

import argparse

from tune2gguf.commands import expand_path


def main() -> None:
    from tune2gguf.base.random_base import KINDS
    from tune2gguf.model.architectures import ARCHITECTURES

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, choices=ARCHITECTURES)
    parser.add_argument("--kind", default="bf16", choices=KINDS)
    parser.add_argument("--out", required=True, type=expand_path, metavar="DIR")
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="the device that draws the weights")
    parser.add_argument(
        "--tokenizer-json", action="store_true", help="write tokenizer.json instead of Meta's tokenizer.model"
    )
    arguments = parser.parse_args()

    from tune2gguf.base.pypi import LLAMA3_TOKENIZER, fetch_pypi_file
    from tune2gguf.base.random_base import write_random_base
    from tune2gguf.files.atomic import refuse_existing

    refuse_existing(arguments.out)
    base_dir = write_random_base(
        ARCHITECTURES[arguments.model],
        arguments.out,
        kind=arguments.kind,
        seed=arguments.seed,
        device=arguments.device,
        tokenizer_model=fetch_pypi_file(LLAMA3_TOKENIZER),
        as_tokenizer_json=arguments.tokenizer_json,
    )
    print(f"base: {base_dir}")
