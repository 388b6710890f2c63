"""Get the base model that a config names: tune2gguf download --config configs/llama3_2_1b/lora.yaml"""

import argparse
import sys

from tune2gguf.commands import find_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, type=find_config, help="a YAML with base_dir and base_source")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for example base_dir=models/other")
    arguments = parser.parse_args()

    from tune2gguf.base.download import download_base
    from tune2gguf.config.read import read_base_keys

    try:
        base_dir, source = read_base_keys(arguments.config, arguments.overrides)
        is_new = download_base(base_dir, source)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; run the same command again to continue")
    print(f"base: {base_dir}" if is_new else f"base: {base_dir} (already there and complete)")
