"""The cache of quantized base tensors saves work and can never change the bytes."""

import os
from pathlib import Path

import numpy as np
import pytest

from tests.parity.gguf_models import ALPHA, RANK, SMALL_MODELS, draw_adapter, write_small_run
from tests.runs import set_adapter, set_base
from tune2gguf.export.gguf_file.cache import DIGEST_BYTES, QuantizedCache
from tune2gguf.export.pipeline import export_run

TYPES = ["Q4_K_M", "Q8_0", "BF16"]


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TUNE2GGUF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "quantized"


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A run whose adapter is on the attention only."""
    run_dir = write_small_run(SMALL_MODELS[0], tmp_path / "run")
    weights = draw_adapter(SMALL_MODELS[0].architecture)
    attention = {name: weight for name, weight in weights.items() if "self_attn" in name}
    set_adapter(run_dir, attention, rank=RANK, alpha=ALPHA)
    return run_dir


def export(run_dir: Path, **options) -> list[bytes]:
    files = export_run(run_dir, quantizations=TYPES, overwrite=True, show=False, **options).models
    return [file.gguf_path.read_bytes() for file in files]


def list_entries(cache_dir: Path) -> list[Path]:
    return sorted(path for path in cache_dir.glob("*/*"))


@pytest.fixture
def num_quantized(monkeypatch) -> dict[str, int]:
    """Counts the rows that the kernels quantize, by type."""
    from tune2gguf.export.gguf_file.kernels import Kernels

    counts: dict[str, int] = {}
    quantize = Kernels.quantize

    def count(self, rows: np.ndarray, ggml_type: str) -> np.ndarray:
        counts[ggml_type] = counts.get(ggml_type, 0) + len(rows)
        return quantize(self, rows, ggml_type)

    monkeypatch.setattr(Kernels, "quantize", count)
    return counts


def test_bytes_are_the_same_without_with_an_empty_and_with_a_full_cache(run_dir, cache_dir):
    without = export(run_dir, max_cache_bytes=0)
    assert not cache_dir.exists()
    assert export(run_dir) == without
    assert list_entries(cache_dir)
    assert export(run_dir) == without


def test_second_export_quantizes_only_what_the_adapter_touches(run_dir, num_quantized):
    export(run_dir)
    first = dict(num_quantized)
    num_quantized.clear()
    export(run_dir)
    architecture = SMALL_MODELS[0].architecture
    # Q6_K is the embedding, half of the down projections, and half of the value projections, which have an adapter.
    value_rows = architecture.num_kv_heads * architecture.head_dim * architecture.num_layers
    assert num_quantized["Q6_K"] < value_rows < first["Q6_K"]
    assert num_quantized["Q4_K"] < first["Q4_K"] / 2
    assert num_quantized["Q8_0"] == first["Q8_0"], "cheap types are not kept"


def test_another_run_on_the_same_base_uses_the_entries(run_dir, tmp_path, cache_dir):
    export(run_dir)
    before = list_entries(cache_dir)
    other = write_small_run(SMALL_MODELS[0], tmp_path / "other")
    export(other)
    assert list_entries(cache_dir) == before, "same bytes at another path have the same keys"


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: b""]
)
def test_a_damaged_entry_is_quantized_again(run_dir, cache_dir, damage):
    expected = export(run_dir)
    entries = list_entries(cache_dir)
    for path in entries:
        path.write_bytes(damage(path.read_bytes()))
    assert export(run_dir) == expected
    assert all(len(path.read_bytes()) > DIGEST_BYTES for path in entries), "it is replaced by a good one"


def test_a_changed_base_at_the_same_path_is_quantized_anew(run_dir):
    from safetensors.torch import load_file, save_file

    before = export(run_dir)
    path = run_dir.parent / "base" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.0.mlp.up_proj.weight"][5, 5] += 1
    save_file(weights, path)
    set_base(run_dir, path.parent)
    changed = export(run_dir)
    assert changed != before
    assert changed == export(run_dir, max_cache_bytes=0)


def test_the_least_recently_used_entries_go_first(tmp_path):
    cache = QuantizedCache(tmp_path, max_bytes=3 * (DIGEST_BYTES + 100))
    keys = [f"{number:064x}" for number in range(5)]
    for age, key in enumerate(keys):
        cache.write(key, np.full(100, age, np.uint8))
        path = tmp_path / key[:2] / key
        os.utime(path, ns=(age, age))
    assert cache.read(keys[0]) is not None, "using an entry makes it the newest"
    cache.remove_oldest()
    assert [cache.read(key) is not None for key in keys] == [True, False, False, True, True]


def test_an_unwritable_cache_is_said_once_and_does_not_stop_the_export(run_dir, tmp_path, monkeypatch, capfd):
    expected = export(run_dir, max_cache_bytes=0)
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("TUNE2GGUF_CACHE", str(tmp_path / "file"))
    assert export(run_dir) == expected
    assert capfd.readouterr().err.count("quantized tensors are not kept in") == 1
