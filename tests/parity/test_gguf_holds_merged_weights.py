"""The GGUF has base + alpha / rank * B @ A: equal to peft's merge, with row order and rounding."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.parity.gguf_models import write_run
from tune2gguf.base.layout import get_gguf_name, list_tensors
from tune2gguf.export.gguf_file.llama import compute_rope_factors
from tune2gguf.export.pipeline import export_run
from tune2gguf.model.architectures import read_architecture

BF16_STEP = 2**-8  # rounding to nearest is off by at most half a step of 2^-7


@pytest.fixture(scope="module")
def run_dir(tiny_base, tmp_path_factory) -> Path:
    return write_run(tiny_base, tmp_path_factory.mktemp("runs") / "tiny", chat_template="chatml")


@pytest.fixture(scope="module")
def peft_weights(tiny_base, run_dir, peft) -> dict[str, np.ndarray]:
    """Return peft's merged weights, by Hugging Face's names."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(model, run_dir / "last").merge_and_unload()
    return {name: tensor.numpy() for name, tensor in merged.state_dict().items()}


def read_gguf(path: Path) -> dict[str, np.ndarray]:
    from gguf import GGUFReader, dequantize

    return {
        tensor.name: dequantize(tensor.data, tensor.tensor_type).reshape(tuple(reversed(tensor.shape.tolist())))
        for tensor in GGUFReader(path).tensors
    }


def find_largest_differences(
    gguf_weights: dict[str, np.ndarray], peft_weights: dict[str, np.ndarray], base_dir: Path, *, permutes: bool
) -> dict[str, float]:
    """Return the largest difference of each tensor, relative to the tensor's largest weight."""
    from torchtune.models.convert_weights import hf_to_tune

    architecture = read_architecture(base_dir)
    differences = {}
    for spec in list_tensors(architecture):
        expected = peft_weights[spec.hf_name]
        if permutes and spec.num_heads is not None:
            # torchtune's conversion: its order of rows is GGUF's.
            converted = hf_to_tune(
                {spec.hf_name: torch.from_numpy(expected)},
                num_heads=architecture.num_heads,
                num_kv_heads=architecture.num_kv_heads,
                dim=architecture.embed_dim,
                head_dim=architecture.head_dim,
            )
            expected = converted[spec.tune_name].numpy()
        found = gguf_weights[get_gguf_name(spec.tune_name)]
        differences[spec.tune_name] = float(np.abs(found - expected).max() / np.abs(expected).max())
    return differences


@pytest.fixture(scope="module")
def gguf_weights(run_dir) -> dict[str, dict[str, np.ndarray]]:
    files = export_run(run_dir, quantizations=["F32", "Q8_0"], show=False).models
    return {file.quantization: read_gguf(file.gguf_path) for file in files}


def test_gguf_holds_the_weights_that_peft_merges(gguf_weights, peft_weights, tiny_base):
    differences = find_largest_differences(gguf_weights["F32"], peft_weights, tiny_base, permutes=True)
    assert max(differences.values()) <= BF16_STEP
    assert max(value for name, value in differences.items() if "norm" in name) == 0, (
        "norms are neither merged nor rounded"
    )


def test_quantized_gguf_is_close_to_the_merged_weights(gguf_weights, peft_weights, tiny_base):
    differences = find_largest_differences(gguf_weights["Q8_0"], peft_weights, tiny_base, permutes=True)
    # A block's largest weight is 127 steps: half a step off, and the rounding to bf16.
    assert max(differences.values()) <= 0.5 / 127 + BF16_STEP


def test_without_the_row_permutation_query_and_key_differ(gguf_weights, peft_weights, tiny_base):
    """Negative control."""
    differences = find_largest_differences(gguf_weights["F32"], peft_weights, tiny_base, permutes=False)
    permuted = {name for name, value in differences.items() if value > 1e-2}
    assert permuted == {name for name in differences if "q_proj" in name or "k_proj" in name}


def test_without_the_adapter_every_linear_layer_differs(gguf_weights, tiny_base):
    """Negative control."""
    from safetensors.numpy import load_file

    base_weights = load_file(tiny_base / "model.safetensors")
    differences = find_largest_differences(gguf_weights["F32"], base_weights, tiny_base, permutes=True)
    assert min(value for name, value in differences.items() if ".attn." in name or ".mlp." in name) > 1e-2


def test_rope_factors_are_those_of_transformers(tiny_base, gguf_weights):
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = AutoConfig.from_pretrained(tiny_base)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    architecture = read_architecture(tiny_base)
    plain = 1.0 / architecture.rope_base ** (np.arange(0, architecture.head_dim, 2) / architecture.head_dim)
    np.testing.assert_allclose(gguf_weights["F32"]["rope_freqs.weight"], plain / scaled.numpy(), rtol=1e-6)
    assert len(set(compute_rope_factors(architecture).tolist())) > 1


def test_merged_folder_gives_the_logits_of_peft(run_dir, tiny_base, tmp_path, peft):
    from transformers import AutoModelForCausalLM

    from tests.parity.make_gguf_digests import write_hf_folder

    write_hf_folder(run_dir, tmp_path / "merged", is_merged=True)
    tokens = torch.arange(30)[None] * 7 % 384
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
        plain = base(tokens).logits
        expected = peft.PeftModel.from_pretrained(base, run_dir / "last")(tokens).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(tokens).logits
    spread = expected.std()
    assert (found - expected).std() < 0.02 * spread, "weights differ by the rounding to bfloat16 only"
    assert (plain - expected).std() > 0.5 * spread, "negative control: the adapter changes the logits"


def test_merged_folder_names_the_trained_chat_template(run_dir, tmp_path):
    from tests.parity.make_gguf_digests import write_hf_folder
    from tune2gguf.tokenizer.templates import CHATML

    write_hf_folder(run_dir, tmp_path / "merged", is_merged=True)
    config = json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text())
    assert config["chat_template"] == CHATML.jinja_template
    assert config["eos_token"] == CHATML.end_of_turn


def test_merged_folder_has_the_shards_of_the_base(tmp_path):
    from transformers import AutoModelForCausalLM

    from tests.conftest import TINY_UNTIED, write_tiny_tokenizer
    from tests.parity.make_gguf_digests import write_hf_folder
    from tune2gguf.base.random_base import write_random_base

    base_dir = write_random_base(TINY_UNTIED, tmp_path / "base", max_shard_bytes=40_000)
    write_tiny_tokenizer(base_dir)
    run_dir, merged_dir = write_run(base_dir, tmp_path / "run", chat_template="chatml"), tmp_path / "merged"
    write_hf_folder(run_dir, merged_dir, is_merged=True)
    index = "model.safetensors.index.json"
    maps = [json.loads((folder / index).read_text())["weight_map"] for folder in (base_dir, merged_dir)]
    assert maps[0] == maps[1] and len(set(maps[0].values())) > 2
    plain, merged = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        for folder in (base_dir, merged_dir)
    )
    changed = {name for name, weight in merged.items() if not torch.equal(weight, plain[name])}
    assert changed == {spec.hf_name for spec in list_tensors(TINY_UNTIED) if spec.is_linear}
