"""The export's layer-by-layer evaluation equals the recipe's model with the same weights."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.parity.gguf_models import write_run
from tune2gguf.base.checkpoint import open_base
from tune2gguf.export.gguf_file.imatrix import write_imatrix
from tune2gguf.export.measure.importance import measure_importance
from tune2gguf.export.measure.layerwise import WeightSource, compute_hidden
from tune2gguf.export.measure.weight_sources import (
    open_base_source,
    open_gguf_source,
    open_merged_source,
    open_quantized_source,
)
from tune2gguf.export.merge.adapter import read_adapter
from tune2gguf.export.pipeline import export_run
from tune2gguf.ggml.kernels import load_kernels
from tune2gguf.ggml.types import QUANTIZATIONS
from tune2gguf.runs.config_file import read_config

GGML_TYPES = ("F32", "F16", "BF16", "Q4_0", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL")
GGML_TYPES += ("Q4_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ3_S", "IQ3_XXS")
GGML_TYPES += ("IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")
ROWS = [np.arange(30) * 7 % 384, np.arange(5) * 11 % 384, np.arange(17) * 5 % 384]


@pytest.fixture(scope="module", params=["tied with rope scaling", "untied"])
def run_dir(request, tiny_base, tiny_untied_base, tmp_path_factory) -> Path:
    base_dir = tiny_untied_base if request.param == "untied" else tiny_base
    return write_run(base_dir, tmp_path_factory.mktemp("runs") / "run", chat_template="chatml")


@pytest.fixture(scope="module")
def base(run_dir):
    return open_base(read_config(run_dir)["base_dir"])


def compute_logits(source: WeightSource) -> torch.Tensor:
    return source.multiply_head(compute_hidden(source, ROWS))


def compute_recipe_logits(base, adapter) -> torch.Tensor:
    """Return the recipe's model with the adapter's weights."""
    from tune2gguf.base.load import load_base
    from tune2gguf.model.llama import lora_llama
    from tune2gguf.model.lora import initialize_adapters

    model = lora_llama(
        str(base.base_dir),
        architecture=None,
        lora_rank=8,
        lora_alpha=16,
        lora_dropout=0.0,
        lora_attn_modules=["q_proj", "k_proj", "v_proj", "output_proj"],
        apply_lora_to_mlp=True,
        max_seq_len=64,
    )
    load_base(model, str(base.base_dir), device=torch.device("cpu"), base_weights="fp32", show=False)
    initialize_adapters(model, 0)
    with torch.no_grad():
        for name, module in model.decoder.named_modules():
            pair = adapter.pairs.get(f"{name}.weight")
            if pair is not None:
                module.lora_a.weight.copy_(torch.from_numpy(pair.lora_a))
                module.lora_b.weight.copy_(torch.from_numpy(pair.lora_b))
        model.eval()
        hidden = torch.cat([model.compute_hidden(torch.from_numpy(row)[None])[0] for row in ROWS])
        return hidden @ model.head_weight.T


def test_unmerged_adapter_gives_the_logits_of_the_recipes_model(base, run_dir):
    adapter = read_adapter(run_dir / "last", base.specs)
    expected = compute_recipe_logits(base, adapter)
    found = compute_logits(open_base_source(base, adapter=adapter))
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    plain = compute_logits(open_base_source(base, adapter=None))
    assert (plain - expected).std() > 0.1 * expected.std(), "negative control: without the adapter it is another model"


def test_merged_weights_differ_by_rounding_only(base, run_dir):
    adapter = read_adapter(run_dir / "last", base.specs)
    expected = compute_logits(open_base_source(base, adapter=adapter))
    found = compute_logits(open_merged_source(base, adapter))
    assert 0 < (found - expected).std() < 0.02 * expected.std()


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K_M", "F16", "BF16"])
def test_a_file_holds_what_its_type_would_hold(base, run_dir, name):
    adapter, kernels = read_adapter(run_dir / "last", base.specs), load_kernels()
    path = export_run(run_dir, quantizations=[name], overwrite=True, show=False).models[0].gguf_path
    from_file = compute_logits(open_gguf_source(path, base))
    simulated = compute_logits(open_quantized_source(base, adapter, QUANTIZATIONS[name], kernels))
    assert torch.equal(from_file, simulated)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K_M", "IQ3_XXS"])
def test_a_file_with_an_importance_matrix_holds_what_its_type_would_hold(base, run_dir, name):
    adapter, kernels = read_adapter(run_dir / "last", base.specs), load_kernels()
    matrix = measure_importance(open_merged_source(base, adapter), ROWS, name="x.gguf", dataset="")
    path = run_dir.with_name("x.gguf")
    write_imatrix(path, matrix)
    file = export_run(run_dir, quantizations=[name], imatrix=path, overwrite=True, show=False).models[0]
    from_file = compute_logits(open_gguf_source(file.gguf_path, base))
    quantized = open_quantized_source(base, adapter, QUANTIZATIONS[name], kernels, importance=matrix)
    assert torch.equal(from_file, compute_logits(quantized))


@pytest.mark.slow
@pytest.mark.parametrize("ggml_type", GGML_TYPES)
def test_dequantized_values_are_those_of_the_gguf_library(ggml_type):
    from gguf import GGMLQuantizationType, dequantize

    rows = np.random.default_rng(0).normal(size=(3, 512)).astype(np.float32)
    kernels = load_kernels()
    quantized = kernels.quantize(rows, ggml_type, np.ones(512, np.float32))
    expected = dequantize(quantized, GGMLQuantizationType[ggml_type])
    np.testing.assert_array_equal(kernels.dequantize(quantized, ggml_type), expected)
    assert np.abs(expected - rows).max() < (3.0 if ggml_type.startswith(("IQ1", "IQ2")) else 1.0)
