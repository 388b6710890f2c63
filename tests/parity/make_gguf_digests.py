"""Write gguf_digests.txt: the sha256 of files from llama.cpp's converter and llama-quantize, for the small models and
the real SmolLM2.

python -m tests.parity.make_gguf_digests
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path

from tests.parity.gguf_models import SMALL_MODELS, SmallModel, draw_integers, write_small_run, write_smollm2_run
from tests.parity.llama_cpp_oracle import (
    convert_adapter,
    convert_to_bf16,
    find_missing_programs,
    quantize,
    quantize_with_importance,
)
from tune2gguf.base.checkpoint import open_base
from tune2gguf.base.layout import get_gguf_name, list_tensors
from tune2gguf.export.chat_template import choose_chat_template
from tune2gguf.export.gguf_file.imatrix import ImportanceMatrix, write_imatrix
from tune2gguf.export.merge.adapter import read_adapter
from tune2gguf.export.merged_hf import write_merged_hf
from tune2gguf.ggml.types import QUANTIZATIONS
from tune2gguf.runs.run import open_run

PLAIN_TYPES = [name for name, quantization in QUANTIZATIONS.items() if not quantization.needs_importance]
IMPORTANCE_TYPES = [name for name, quantization in QUANTIZATIONS.items() if quantization.takes_importance]
IMPORTANCE = "imatrix"
DIGESTS_FILE = Path(__file__).with_name("gguf_digests.txt")
HEADER = (
    "# sha256 of llama.cpp's own files (converter to bf16, then llama-quantize, x86-64); made by make_gguf_digests.py\n"
)


def main() -> None:
    missing = find_missing_programs()
    if missing is not None:
        raise SystemExit(missing)
    lines = []
    for model in SMALL_MODELS:
        with tempfile.TemporaryDirectory() as folder:
            lines += make_lines(model, Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        lines += make_real_lines(Path(folder))
    DIGESTS_FILE.write_text(HEADER + "".join(lines))
    print(DIGESTS_FILE)


def make_lines(model: SmallModel, folder: Path) -> list[str]:
    """Return `MODEL base|merged|imatrix TYPE DIGEST` for each kind's types, and `MODEL adapter F32 DIGEST`."""
    run_dir = write_small_run(model, folder)
    # A file has its folder's name as the model's name, so both kinds are converted from folders of the same name.
    for kind, parent in (("base", folder / "plain"), ("merged", folder / "merged")):
        write_hf_folder(run_dir, parent / model.name, is_merged=kind == "merged")
        pre = "llama-bpe" if model.chat_template == "llama3" else "smollm"
        convert_to_bf16(parent / model.name, folder / f"{kind}.gguf", pre=pre)
        quantize(folder / f"{kind}.gguf", folder / (kind + "-{}.gguf"), PLAIN_TYPES)
    imatrix_path = write_drawn_imatrix(model, folder / "imatrix.gguf")
    for name in IMPORTANCE_TYPES:
        target = folder / f"{IMPORTANCE}-{name}.gguf"
        quantize_with_importance(folder / "merged.gguf", target, name, imatrix_path=imatrix_path)
    shutil.copytree(run_dir / "last", folder / "adapter" / model.name)
    convert_adapter(folder / "adapter" / model.name, folder / "base", folder / "adapter-F32.gguf")
    return [
        f"{model.name} {kind} {name} {digest_file(folder / f'{kind}-{name}.gguf')}\n" for kind, name in list_files()
    ]


def make_real_lines(folder: Path) -> list[str]:
    """Return `SmolLM2-135M-Instruct merged TYPE DIGEST` for all types."""
    run_dir = write_smollm2_run(folder)
    write_hf_folder(run_dir, folder / "merged" / run_dir.name, is_merged=True)
    convert_to_bf16(folder / "merged" / run_dir.name, folder / "merged.gguf")
    lines = []
    for name in PLAIN_TYPES:
        quantize(folder / "merged.gguf", folder / "{}.gguf", [name])
        lines.append(f"{run_dir.name} merged {name} {digest_file(folder / f'{name}.gguf')}\n")
        (folder / f"{name}.gguf").unlink()
    return lines


def list_files() -> list[tuple[str, str]]:
    """Return (base, merged, with importance or adapter, type) of each file with a digest."""
    plain = [(kind, name) for kind in ("base", "merged") for name in PLAIN_TYPES]
    return [*plain, *((IMPORTANCE, name) for name in IMPORTANCE_TYPES), ("adapter", "F32")]


def write_drawn_imatrix(model: SmallModel, path: Path) -> Path:
    """Write an importance matrix whose values depend on the tensor's name only."""
    sums = {}
    for spec in list_tensors(model.architecture):
        if spec.is_linear:
            drawn = draw_integers(f"{spec.tune_name} importance", (spec.shape[1],))
            sums[get_gguf_name(spec.tune_name)] = drawn * drawn + 16
    counts = dict.fromkeys(sums, 128)
    write_imatrix(path, ImportanceMatrix(path.name, sums, counts, ("calibration.jsonl",), num_chunks=4, chunk_size=32))
    return path


def write_hf_folder(run_dir: Path, out_dir: Path, *, is_merged: bool) -> None:
    """Write the converter's input: the base, unchanged or with the adapter merged."""
    run = open_run(run_dir)
    base = open_base(run.base_dir)
    if not is_merged:
        shutil.copytree(run.base_dir, out_dir)
        return
    adapter = read_adapter(run.adapter_dir, base.specs)
    chat_template = choose_chat_template(run, base)
    write_merged_hf(out_dir, base=base, adapter=adapter, chat_template=chat_template, report=lambda count: None)


def digest_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_digests() -> dict[tuple[str, str, str], str]:
    """Return (model, base, merged or adapter, type) -> sha256."""
    lines = [line.split() for line in DIGESTS_FILE.read_text().splitlines() if not line.startswith("#")]
    return {(model, kind, name): digest for model, kind, name, digest in lines}


if __name__ == "__main__":
    main()
