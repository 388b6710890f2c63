"""The exported files equal those of llama.cpp's converter and llama-quantize, byte by byte."""

import platform
from dataclasses import replace
from pathlib import Path

import pytest

from tests.parity import llama_cpp_oracle as oracle
from tests.parity.gguf_models import REAL_MODEL, SMALL_MODELS, write_run, write_small_run, write_smollm2_run
from tests.parity.make_gguf_digests import (
    IMPORTANCE,
    IMPORTANCE_TYPES,
    PLAIN_TYPES,
    digest_file,
    list_files,
    make_lines,
    make_real_lines,
    read_digests,
    write_drawn_imatrix,
    write_hf_folder,
)
from tests.parity.make_type_mix import TYPE_MIX_FILE, WITH_IMPORTANCE, format_types, list_real_tensors, make_block
from tests.tokenizer_files import find_llama3_tokenizer
from tune2gguf.base.checkpoint import open_base
from tune2gguf.base.random_base import write_random_base
from tune2gguf.export.adapter_gguf import write_adapter_gguf
from tune2gguf.export.gguf_file.imatrix import read_imatrix, write_imatrix
from tune2gguf.export.gguf_file.llama import choose_types
from tune2gguf.export.merge.adapter import read_adapter
from tune2gguf.export.pipeline import export_base, export_run
from tune2gguf.ggml.types import QUANTIZATIONS, choose_tensor_type
from tune2gguf.model.architectures import ARCHITECTURES, LLAMA3_1_8B, LLAMA3_2_1B, Architecture

# Kernels compiled for other processors may fuse multiplications and additions.
on_x86_64 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="bytes are those of x86-64")
needs_oracle = pytest.mark.skipif(oracle.find_missing() is not None, reason=str(oracle.find_missing()))
needs_programs = pytest.mark.skipif(
    oracle.find_missing_programs() is not None, reason=str(oracle.find_missing_programs())
)
MODEL_NAMES = [model.name for model in SMALL_MODELS]
QUICK_TYPES = ["Q8_0", "Q4_K_M", "Q5_K_S", "Q3_K_M", "Q4_0", "F16", "BF16"]


def export_digests(run_dir: Path, names: list[str]) -> dict[str, str]:
    exported = export_run(run_dir, quantizations=names, num_threads=2, show=False).models
    return {file.quantization: digest_file(file.gguf_path) for file in exported}


@pytest.mark.slow
@on_x86_64
@pytest.mark.parametrize("model", SMALL_MODELS, ids=MODEL_NAMES)
def test_every_type_has_the_bytes_of_llama_cpp_with_the_adapter_merged(model, tmp_path):
    digests = read_digests()
    assert export_digests(write_small_run(model, tmp_path), PLAIN_TYPES) == {
        name: digests[model.name, "merged", name] for name in PLAIN_TYPES
    }


@pytest.mark.slow
@on_x86_64
@pytest.mark.parametrize("model", SMALL_MODELS, ids=MODEL_NAMES)
def test_every_type_with_an_importance_matrix_has_the_bytes_of_llama_quantize(model, tmp_path):
    digests, run_dir = read_digests(), write_small_run(model, tmp_path)
    imatrix = write_drawn_imatrix(model, tmp_path / "imatrix.gguf")
    found = export_run(run_dir, quantizations=IMPORTANCE_TYPES, imatrix=imatrix, num_threads=2, show=False).models
    assert {file.quantization: digest_file(file.gguf_path) for file in found} == {
        name: digests[model.name, IMPORTANCE, name] for name in IMPORTANCE_TYPES
    }


@pytest.mark.slow
def test_another_importance_matrix_changes_the_bytes(tmp_path):
    """Negative control: the matrix changes the weights, not only the metadata."""
    model = SMALL_MODELS[0]
    run_dir, imatrix = write_small_run(model, tmp_path), write_drawn_imatrix(model, tmp_path / "imatrix.gguf")
    options = {"quantizations": ["Q4_K_M", "IQ2_XS"], "imatrix": imatrix, "overwrite": True, "show": False}
    before = [file.gguf_path.read_bytes() for file in export_run(run_dir, **options).models]
    matrix = read_imatrix(imatrix)
    name = "blk.0.ffn_up.weight"
    write_imatrix(imatrix, replace(matrix, sums=matrix.sums | {name: matrix.sums[name][::-1].copy()}))
    after = [file.gguf_path.read_bytes() for file in export_run(run_dir, **options).models]
    assert [len(data) for data in before] == [len(data) for data in after]
    assert all(old != new for old, new in zip(before, after, strict=True))


@pytest.mark.slow
@on_x86_64
@pytest.mark.parametrize("model", SMALL_MODELS, ids=MODEL_NAMES)
def test_a_plain_base_has_the_bytes_of_llama_cpp(model, tmp_path):
    write_small_run(model, tmp_path)
    (tmp_path / "plain").mkdir()
    base_dir = (tmp_path / "base").rename(tmp_path / "plain" / model.name)
    digests = read_digests()
    for name in ("BF16", "Q4_K_M", "IQ4_XS"):
        target = tmp_path / f"{name}.gguf"
        export_base(base_dir, target, quantization=name, chat_template=model.chat_template, show=False)
        assert digest_file(target) == digests[model.name, "base", name]


@pytest.mark.parametrize("model", SMALL_MODELS, ids=MODEL_NAMES)
def test_adapter_file_has_the_bytes_of_llama_cpp(model, tmp_path):
    run_dir = write_small_run(model, tmp_path)
    specs = open_base(tmp_path / "base").specs
    adapter = read_adapter(run_dir / "last", specs)
    write_adapter_gguf(tmp_path / "adapter.gguf", adapter, specs=specs, name=run_dir.name)
    assert digest_file(tmp_path / "adapter.gguf") == read_digests()[model.name, "adapter", "F32"]


def test_an_adapter_changes_the_bytes():
    """Negative control: the digests tell merged files from plain ones."""
    digests = read_digests()
    assert len(set(digests.values())) == len(digests) == len(SMALL_MODELS) * len(list_files()) + len(PLAIN_TYPES)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_types_are_those_of_llama_quantize(name):
    architecture = ARCHITECTURES[name]
    tensors = list_real_tensors(architecture)
    lines = []
    for label, names in (("", PLAIN_TYPES), (WITH_IMPORTANCE, IMPORTANCE_TYPES)):
        for kind in (QUANTIZATIONS[each] for each in names):
            types = choose_types(tensors, architecture, kind, has_importance=bool(label))
            lines += format_types(name, kind.name + label, types)
    expected = [line for line in TYPE_MIX_FILE.read_text().splitlines(keepends=True) if line.startswith(f"{name} ")]
    assert lines == expected


# llama-quant.cpp: `if (model.type == LLM_TYPE_70B) … if (new_type == Q3_K || new_type == Q4_K) new_type = Q5_K`; a
# model of 80 layers is 65B if every query has a key of its own. (quantization, layer) -> attn_v of 70B and of 65B.
VALUES_OF_80_LAYERS = {
    ("Q4_K_M", 0): ("Q6_K", "Q6_K"),
    ("Q4_K_M", 10): ("Q5_K", "Q4_K"),
    ("Q4_K_S", 3): ("Q5_K", "Q5_K"),
    ("Q4_K_S", 4): ("Q5_K", "Q4_K"),
    ("Q3_K_S", 40): ("Q5_K", "Q3_K"),
    ("Q3_K_M", 40): ("Q5_K", "Q4_K"),
    ("Q2_K", 40): ("Q5_K", "Q3_K"),
    ("Q5_K_M", 10): ("Q5_K", "Q5_K"),
    ("Q6_K", 40): ("Q6_K", "Q6_K"),
    ("Q4_0", 40): ("Q4_0", "Q4_0"),
    ("IQ4_XS", 40): ("Q5_K", "IQ4_XS"),
}


@pytest.mark.parametrize(("which", "expected"), VALUES_OF_80_LAYERS.items())
def test_value_weights_of_80_layers_get_the_types_of_70b(which, expected):
    quantization, layer = which
    found = [
        choose_tensor_type(
            f"blk.{layer}.attn_v.weight",
            (8192 // queries_per_key, 8192),
            QUANTIZATIONS[quantization],
            num_layers=80,
            queries_per_key=queries_per_key,
            is_tied=False,
        )
        for queries_per_key in (8, 1)
    ]
    assert tuple(found) == expected


@pytest.mark.oracle
@needs_oracle
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_committed_types_are_what_llama_quantize_plans(name, tmp_path):
    assert make_block(name, tmp_path / "sparse.gguf") in TYPE_MIX_FILE.read_text()


@pytest.mark.oracle
@needs_programs
@pytest.mark.parametrize("model", SMALL_MODELS, ids=MODEL_NAMES)
def test_committed_digests_are_what_llama_cpp_writes(model, tmp_path):
    digests = read_digests()
    expected = [f"{model.name} {kind} {name} {digests[model.name, kind, name]}\n" for kind, name in list_files()]
    assert make_lines(model, tmp_path) == expected


@pytest.mark.oracle
@pytest.mark.slow
@needs_oracle
def test_committed_digests_of_the_real_model_are_what_llama_cpp_writes(tmp_path):
    digests = read_digests()
    expected = [f"{REAL_MODEL} merged {name} {digests[REAL_MODEL, 'merged', name]}\n" for name in PLAIN_TYPES]
    assert make_real_lines(tmp_path / "theirs") == expected
    others = [name for name in PLAIN_TYPES if name not in QUICK_TYPES]
    assert export_digests(write_smollm2_run(tmp_path / "ours"), others) == {
        name: digests[REAL_MODEL, "merged", name] for name in others
    }


@on_x86_64
@pytest.mark.slow
def test_the_real_model_has_the_bytes_of_llama_cpp(tmp_path):
    """Types that quantize in seconds. The oracle's test has this model's other types."""
    digests = read_digests()
    assert export_digests(write_smollm2_run(tmp_path), QUICK_TYPES) == {
        name: digests[REAL_MODEL, "merged", name] for name in QUICK_TYPES
    }


def write_tied_llama(folder: Path) -> tuple[Path, str]:
    shape = {"num_layers": 4, "num_heads": 8, "num_kv_heads": 2, "embed_dim": 256, "intermediate_dim": 512}
    architecture = Architecture(**{**vars(LLAMA3_2_1B), **shape, "head_dim": 32})
    base_dir = folder / "Tiny-Llama-3.2-Instruct"
    return write_random_base(architecture, base_dir, tokenizer_model=find_llama3_tokenizer()), "llama3"


def write_untied_llama(folder: Path) -> tuple[Path, str]:
    shape = {"num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 256, "intermediate_dim": 768}
    architecture = Architecture(**{**vars(LLAMA3_1_8B), **shape, "head_dim": 64})
    base_dir = folder / "Tiny-Llama-3.1-Instruct"
    tokenizer = find_llama3_tokenizer()
    # Shards like the real model's.
    return write_random_base(architecture, base_dir, tokenizer_model=tokenizer, max_shard_bytes=70_000_000), "llama3"


@pytest.mark.oracle
@pytest.mark.slow
@needs_oracle
@pytest.mark.parametrize("write_base", [write_tied_llama, write_untied_llama])
def test_real_tokenizers_and_widths_give_the_bytes_of_llama_cpp(write_base, tmp_path):
    base_dir, chat_template = write_base(tmp_path / "bases")
    run_dir = write_run(base_dir, tmp_path / "runs" / "Some-Run", chat_template=chat_template)
    exported = export_run(run_dir, quantizations=PLAIN_TYPES, show=False).models
    write_hf_folder(run_dir, tmp_path / "merged" / run_dir.name, is_merged=True)
    oracle.convert_to_bf16(tmp_path / "merged" / run_dir.name, tmp_path / "oracle.gguf")
    for file in exported:
        oracle.quantize(tmp_path / "oracle.gguf", tmp_path / "oracle-{}.gguf", [file.quantization])
        expected = tmp_path / f"oracle-{file.quantization}.gguf"
        assert digest_file(file.gguf_path) == digest_file(expected), file.quantization
        expected.unlink()
