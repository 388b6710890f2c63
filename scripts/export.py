"""Export a run: merge its adapter into the base, write GGUF and Modelfile to the run's export folder."""

from __future__ import annotations

import argparse
import sys

from tune2gguf.export.pipeline import export_run
from tune2gguf.export.quantized_cache import DEFAULT_MAX_BYTES
from tune2gguf.export.type_mix import QUANTIZATIONS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="folder of a finished run, such as runs/quickstart")
    parser.add_argument(
        "--quantization",
        nargs="+",
        metavar="TYPE",
        help=f"one or more of {', '.join(QUANTIZATIONS)}; default: the run's own",
    )
    parser.add_argument("--adapter", choices=("best", "last"), help="default: best where there is one, else last")
    parser.add_argument("--base-dir", help="where the base model is, if it has moved since the run")
    parser.add_argument("--force", action="store_true", help="replace files of an earlier export")
    parser.add_argument("--no-cache", action="store_true", help="neither use nor keep quantized tensors of the base")
    arguments = parser.parse_args()
    try:
        models = export_run(
            arguments.run,
            quantizations=arguments.quantization,
            adapter=arguments.adapter,
            base_dir=arguments.base_dir,
            overwrite=arguments.force,
            max_cache_bytes=0 if arguments.no_cache else DEFAULT_MAX_BYTES,
        )
    except ValueError as error:
        sys.exit(f"export.py: {error}")
    for model in models:
        print(f"{model.gguf_path} ({model.gguf_path.stat().st_size / 1e6:.0f} MB)")
        print(model.modelfile_path)


if __name__ == "__main__":
    main()
