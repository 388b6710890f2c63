"""Training on an NF4 base, quantized on load or from a 4-bit checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import TINY_TIED, write_tiny_base
from tests.recipes.test_training import measure_difference, read_records, run_recipe
from tune2gguf.base.bnb4bit import QUANTIZATION_CONFIG, encode_nf4, list_nf4_tensors
from tune2gguf.model.architectures import Architecture
from tune2gguf.model.lora import LoRALinear, to_dense
from tune2gguf.model.nf4 import quantize_nf4
from tune2gguf.model.nf4_tensor import pack_nf4


@pytest.fixture
def nf4_arguments(run_arguments):
    return [*run_arguments, "dtype=bf16", "base_weights=nf4"]


def test_nf4_layer_computes_with_its_dequantized_weight():
    torch.manual_seed(0)
    layer = LoRALinear(64, 32, rank=4, alpha=4.0, dropout=0.0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    exact = layer.weight.data
    layer.weight = torch.nn.Parameter(pack_nf4(quantize_nf4(exact)), requires_grad=False)
    x = torch.randn(5, 64, requires_grad=True)
    dense = to_dense(layer.weight, torch.float32)
    expected = x @ dense.T + layer.lora_b(layer.lora_a(x))
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    gradient, expected_gradient = (torch.autograd.grad(y.sum(), x)[0] for y in (layer(x), expected))
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-5)
    assert (dense - exact).abs().max() > 1e-2  # the layer is 4-bit


def test_run_on_nf4_learns_close_to_a_bf16_run(run_arguments, nf4_arguments, tmp_path, monkeypatch):
    learning = ["epochs=3", "learning_rate=0.02"]
    run_recipe([*nf4_arguments, *learning, f"output_dir={tmp_path / 'nf4'}"], monkeypatch)
    bf16 = ["dtype=bf16", "base_weights=bf16"]
    run_recipe([*run_arguments, *bf16, *learning, f"output_dir={tmp_path / 'bf16'}"], monkeypatch)
    nf4, dense = ([r["val_loss"] for r in read_records(tmp_path / name, "val_loss")] for name in ("nf4", "bf16"))
    assert nf4[-1] < 0.8 * nf4[0]
    assert nf4 == pytest.approx(dense, rel=0.1)
    assert measure_difference(tmp_path / "nf4", tmp_path / "bf16") > 1e-3


def test_layers_without_an_adapter_are_4_bit_too(nf4_arguments, tmp_path, monkeypatch):
    for name, modules in (("some", "[q_proj]"), ("more", "[q_proj, output_proj]")):
        chosen = [f"model.lora_attn_modules={modules}", "model.apply_lora_to_mlp=false", "learning_rate=0.02"]
        run_recipe([*nf4_arguments, *chosen, f"output_dir={tmp_path / name}"], monkeypatch)
        losses = [record["val_loss"] for record in read_records(tmp_path / name, "val_loss")]
        assert losses[-1] < losses[0]


def test_base_that_is_4_bit_already_gives_the_run_of_quantizing_on_load(nf4_arguments, tmp_path, monkeypatch):
    """bitsandbytes' codes are loaded unchanged; only the 8-bit scales differ."""
    # With rows of whole 64-blocks, rows of q and k can be permuted without quantizing them again.
    wide = Architecture(**{**vars(TINY_TIED), "embed_dim": 64, "head_dim": 16, "intermediate_dim": 128})
    dense_dir = write_tiny_base(tmp_path / "dense", wide, dtype=torch.bfloat16)
    bnb_dir = write_bnb4bit_copy(dense_dir, tmp_path / "bnb")
    for base_dir in (dense_dir, bnb_dir):
        run_recipe(
            [*nf4_arguments, f"base_dir={base_dir}", f"output_dir={tmp_path / 'run' / base_dir.name}"], monkeypatch
        )
    quantized, loaded = (read_records(tmp_path / "run" / name, "val_loss") for name in ("dense", "bnb"))
    assert loaded[0]["val_loss"] == pytest.approx(quantized[0]["val_loss"], rel=2e-2)
    assert loaded[-1]["val_loss"] == pytest.approx(quantized[-1]["val_loss"], rel=2e-2)


def write_bnb4bit_copy(dense_dir: Path, bnb_dir: Path) -> Path:
    """Write the same model in the form of unsloth's 4-bit repositories."""
    shutil.copytree(dense_dir, bnb_dir)
    tensors = {}
    for name, weight in load_file(dense_dir / "model.safetensors").items():
        if weight.dim() == 2 and ".layers." in name:
            shape = tuple(weight.shape)
            names = [part.name for part in list_nf4_tensors(name, shape)]
            tensors |= dict(zip(names, encode_nf4([weight], shape, dtype="bfloat16"), strict=True))
        else:
            tensors[name] = weight
    save_file(tensors, bnb_dir / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((bnb_dir / "config.json").read_text())
    (bnb_dir / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZATION_CONFIG}))
    return bnb_dir
