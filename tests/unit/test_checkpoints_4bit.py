import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import TINY_TIED
from tune2gguf.base.bnb4bit import STATE_INFIX
from tune2gguf.base.checkpoint import BaseCheckpoint, open_base
from tune2gguf.base.random_base import write_random_base
from tune2gguf.model.architectures import Architecture
from tune2gguf.model.nf4 import Nf4Weight, quantize_nf4

SHAPE = {"vocab_size": 300, "embed_dim": 128, "intermediate_dim": 192, "head_dim": 32, "tied": False}
TINY = Architecture(**{**vars(TINY_TIED), **SHAPE})
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def base_dir(tmp_path) -> Path:
    return write_random_base(TINY, tmp_path / "nf4", kind="bnb-4bit")


@pytest.fixture
def dense_base(tmp_path) -> BaseCheckpoint:
    """Make the unquantized base: the same seed gives the weights before quantization."""
    return open_base(write_random_base(TINY, tmp_path / "dense"))


def test_layers_matrices_come_as_nf4_of_the_original_weights(base_dir, dense_base):
    found = dict(open_base(base_dir).iterate_tensors())
    for name, spec in dense_base.specs.items():
        original = dense_base.read_tensor(name)
        assert isinstance(found[name], Nf4Weight) == spec.is_linear
        if spec.is_linear:
            assert torch.equal(found[name].codes, quantize_nf4(original).codes), name
            assert torch.allclose(found[name].scales, quantize_nf4(original).scales, rtol=0.02)
        else:
            assert torch.equal(found[name], original)


def test_every_way_to_read_a_weight_gives_the_same_values(base_dir):
    base = open_base(base_dir)
    kept, dense = dict(base.iterate_tensors()), dict(base.iterate_tensors(dtype=torch.float32))
    for name, spec in base.specs.items():
        if spec.is_linear:
            assert torch.equal(kept[name].dequantize(), dense[name])
        assert torch.equal(base.read_tensor(name).float(), dense[name])
        assert np.array_equal(base.read_rows(name, 5, 60), dense[name][5:60])
    rounded = dict(base.iterate_tensors(dtype=torch.bfloat16))
    assert all(torch.equal(rounded[name], dense[name].bfloat16()) for name in dense)


def test_module_left_unquantized_is_read_as_it_is(base_dir):
    path = base_dir / "model.safetensors"
    weights = load_file(path)
    for name in [name for name in weights if name.startswith(f"{DOWN}.")]:
        del weights[name]
    weights[DOWN] = torch.randn(128, 192).bfloat16()
    save_file(weights, path)
    found = dict(open_base(base_dir).iterate_tensors())
    assert torch.equal(found["layers.1.mlp.w2.weight"], weights[DOWN])
    assert isinstance(found["layers.0.mlp.w2.weight"], Nf4Weight)


def change_state(weights: dict[str, torch.Tensor], **changed) -> None:
    name = f"{DOWN}{STATE_INFIX}nf4"
    state = json.loads(bytes(weights[name].tolist())) | changed
    weights[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def set_tensor(suffix: str, tensor: torch.Tensor):
    return lambda weights: weights.update({f"{DOWN}{suffix}": tensor})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weights: weights.pop(f"{DOWN}.absmax"), "broken 4-bit state"),
        (lambda weights: weights.pop(f"{DOWN}.nested_quant_map"), "broken 4-bit state"),
        (lambda weights: weights.pop(DOWN), "broken 4-bit state"),
        (set_tensor(f"{STATE_INFIX}nf4", torch.tensor([1, 2], dtype=torch.uint8)), "broken 4-bit state"),
        (lambda weights: change_state(weights, blocksize=0), "broken 4-bit state"),
        (lambda weights: weights.pop(f"{DOWN}.quant_map"), "quant_map is not NF4's"),
        (set_tensor(".quant_map", torch.zeros(16)), "quant_map is not NF4's"),
        (set_tensor(".absmax", torch.zeros(384)), r"absmax has 1536 bytes, expected 384"),
        (set_tensor(".nested_absmax", torch.zeros(9)), r"nested_absmax has 36 bytes, expected 8"),
        (set_tensor("", torch.zeros(9, 1, dtype=torch.uint8)), r"codes has 9 bytes, expected 12288"),
        (set_tensor(".nested_absmax", torch.zeros(4).bfloat16()), r"nested_absmax has dtype BF16, expected F32"),
        (lambda weights: change_state(weights, shape=[192, 128]), r"has shape \[192, 128\], expected \[128, 192\]"),
        (lambda weights: weights.pop(f"{DOWN}{STATE_INFIX}nf4"), "down_proj.weight is U8|unexpected tensors"),
    ],
)
def test_broken_4bit_weight_is_one_error_that_names_it(base_dir, change, said):
    path = base_dir / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)
    with pytest.raises(ValueError, match=said) as error:
        open_base(base_dir)
    assert DOWN in str(error.value)


def test_other_4bit_type_is_refused(base_dir):
    path = base_dir / "model.safetensors"
    weights = load_file(path)
    weights[f"{DOWN}{STATE_INFIX}fp4"] = weights.pop(f"{DOWN}{STATE_INFIX}nf4")
    save_file(weights, path)
    with pytest.raises(ValueError, match="4-bit type 'fp4'; only nf4 is supported"):
        open_base(base_dir)


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"load_in_8bit": True}, "not its 8 bits"), ({"quant_method": "gptq"}, "quant_method is 'gptq'")],
)
def test_other_quantization_is_refused(base_dir, changed, said):
    path = base_dir / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changed
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=said):
        open_base(base_dir)


LOAD_AND_MEASURE = """
import sys
from pathlib import Path
import torch
from tune2gguf.base.checkpoint import open_base
from tune2gguf.model.nf4 import Nf4Weight, quantize_nf4
from tune2gguf.model.nf4_tensor import pack_nf4

def read_peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

base, model, size, largest = open_base(sys.argv[1]), {}, 0, []
pack_nf4(quantize_nf4(torch.ones(64, 64)))  # what the first call loads is not the model's
before = read_peak()
for name, weight in base.iterate_tensors():
    if base.specs[name].is_linear:
        largest.append(0 if isinstance(weight, Nf4Weight) else weight.nbytes)
        weight = pack_nf4(weight if isinstance(weight, Nf4Weight) else quantize_nf4(weight))
        size += sum(getattr(weight, part).nbytes for part in weight.__tensor_flatten__()[0])
    else:
        size += weight.nbytes
        largest.append(weight.nbytes)
    model[name] = weight
print(size, read_peak() - before, sum(sorted(largest)[-2:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("kind", ["bf16", "bnb-4bit"])
def test_loading_to_nf4_holds_no_16_bit_model(tmp_path, kind):
    shape = {"num_layers": 5, "embed_dim": 1024, "intermediate_dim": 4096, "num_heads": 16, "head_dim": 64}
    architecture = Architecture(**{**vars(TINY), **shape, "num_kv_heads": 8, "vocab_size": 4096})
    base_dir = write_random_base(architecture, tmp_path / "base", kind=kind)
    command = [sys.executable, "-c", LOAD_AND_MEASURE, str(base_dir)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    size, peak, two_largest = map(int, result.stdout.split())
    # The allocator's waste does not grow with the model.
    limit = (1.5 * size if kind == "bnb-4bit" else size + two_largest) + 20e6
    assert peak < limit
    size_in_16_bits = 2 * sum(torch.Size(spec.shape).numel() for spec in open_base(base_dir).specs.values())
    assert limit < 0.7 * size_in_16_bits, "the limit could not tell"
