"""llama.cpp's own programs: its converter, and llama-quantize through `llama-cpp-python`.

install_oracle.sh installs them. Both run in processes of their own: the converter brings its own `gguf`, and
the library must not meet the llama.cpp inside `xllamacpp`.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from tune2gguf.files.cache import get_cache_dir

# The converter knows pre-tokenizers by a hash over real vocabularies, not over the small models'.
_CONVERT = """
import runpy, sys
from pathlib import Path
source, pre = sys.argv[1], sys.argv[2]
sys.path[:0] = [str(Path(source) / "gguf-py"), source]
if pre:
    from conversion.base import TextModel
    TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
sys.argv = ["convert_hf_to_gguf.py", *sys.argv[3:]]
runpy.run_path(str(Path(source) / sys.argv[0]), run_name="__main__")
"""
_CONVERT_LORA = """
import runpy, sys
from pathlib import Path
source = sys.argv[1]
sys.path[:0] = [str(Path(source) / "gguf-py"), source]
sys.argv = ["convert_lora_to_gguf.py", *sys.argv[2:]]
runpy.run_path(str(Path(source) / sys.argv[0]), run_name="__main__")
"""
_QUANTIZE = """
import ctypes, sys
import llama_cpp
source, target, what, num_threads = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.nthread, parameters.dry_run = num_threads, what != "write"
# For the types it is enough that there is a matrix.
entries = (llama_cpp.llama_model_imatrix_data * 2)()
entries[0].name, entries[0].data, entries[0].size = b"none", (ctypes.c_float * 1)(1.0), 1
if what == "plan with importance":
    parameters.imatrix = entries
for name in sys.argv[5:]:
    kind = "ALL" if name == "F32" else "MOSTLY"
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{kind}_{name}")
    print("quantization", name, file=sys.stderr, flush=True)
    if llama_cpp.llama_model_quantize(source.encode(), target.format(name).encode(), ctypes.byref(parameters)):
        sys.exit(f"llama_model_quantize failed for {name}")
"""


def find_missing() -> str | None:
    """Return the reason why the oracle is unusable, or None."""
    if importlib.util.find_spec("llama_cpp") is None:
        return "llama-cpp-python is not installed (tests/parity/install_oracle.sh)"
    if not (get_source() / "convert_hf_to_gguf.py").is_file():
        return f"{get_source()} does not hold llama.cpp's converter (tests/parity/install_oracle.sh)"
    return None


def find_missing_programs() -> str | None:
    """Return the reason why the programs llama-imatrix and llama-quantize are unusable, or None."""
    missing = [name for name in ("llama-imatrix", "llama-quantize") if not _get_program(name).is_file()]
    return find_missing() or (f"{', '.join(missing)} not built (tests/parity/install_oracle.sh)" if missing else None)


def _get_program(name: str) -> Path:
    return get_source() / "programs" / name


def get_source() -> Path:
    """Return the folder of llama.cpp's source, which has the converter."""
    return Path(os.environ.get("LLAMA_CPP_SOURCE", get_cache_dir() / "llama.cpp"))


def convert_to_bf16(hf_dir: Path, gguf_path: Path, *, pre: str = "") -> None:
    """Run convert_hf_to_gguf.py; `pre` names the pre-tokenizer of an unpublished vocabulary."""
    arguments = [str(hf_dir), "--outtype", "bf16", "--outfile", str(gguf_path)]
    _run(_CONVERT, str(get_source()), pre, *arguments)


def convert_adapter(adapter_dir: Path, base_dir: Path, gguf_path: Path, *, outtype: str = "f32") -> None:
    """Run convert_lora_to_gguf.py."""
    arguments = [str(adapter_dir), "--base", str(base_dir), "--outtype", outtype, "--outfile", str(gguf_path)]
    _run(_CONVERT_LORA, str(get_source()), *arguments)


def quantize(gguf_path: Path, pattern: Path, names: list[str], *, num_threads: int = 1) -> None:
    """Run llama-quantize to each type; `{}` in `pattern` becomes the type's name."""
    _run(_QUANTIZE, str(gguf_path), str(pattern), "write", str(num_threads), *names)


def quantize_with_importance(gguf_path: Path, out_path: Path, name: str, *, imatrix_path: Path) -> None:
    """Run llama-quantize with --imatrix in the matrix's folder, because the file records the path."""
    command = [_get_program("llama-quantize"), "--imatrix", imatrix_path.name, gguf_path, out_path, name, "1"]
    _run_program(command, folder=imatrix_path.parent)


def measure_importance(gguf_path: Path, text_path: Path, out_path: Path, *, chunk_size: int, num_chunks: int) -> None:
    """Run llama-imatrix on a text, with a float32 cache."""
    exact = ["-ctk", "f32", "-ctv", "f32", "-fa", "off", "-t", "1", "--no-ppl"]
    command = [_get_program("llama-imatrix"), "-m", gguf_path, "-f", text_path.name, "-o", out_path, *exact]
    _run_program([*command, "-c", str(chunk_size), "--chunks", str(num_chunks)], folder=text_path.parent)


def _run_program(command: list[str | Path], *, folder: Path) -> None:
    finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    if finished.returncode != 0:
        raise RuntimeError(f"{command[0]} failed: {finished.stderr[-2000:]}")


def plan_quantization(gguf_path: Path, names: list[str], *, has_importance: bool = False) -> str:
    """Return llama-quantize's log of a dry run to each type."""
    what = "plan with importance" if has_importance else "plan"
    return _run(_QUANTIZE, str(gguf_path), os.devnull, what, "1", *names)


def _run(program: str, *arguments: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    finished = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    if finished.returncode != 0:
        raise RuntimeError(f"llama.cpp's program failed: {finished.stderr[-2000:]}")
    return finished.stderr
