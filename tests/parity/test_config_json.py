"""config.json: each one gives transformers' logits, or is refused in one line with file, key and value."""

import json
import math
import shutil

import pytest
import torch

from tests.conftest import TINY_TIED, TINY_UNTIED, write_tiny_base
from tests.parity.test_model_equals_transformers import load_ours
from tune2gguf.base.checkpoint import open_base
from tune2gguf.model.architectures import Architecture, make_hf_config

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GONE = object()  # the key is removed


def without(*keys: str) -> dict:
    return {key: value for key, value in LLAMA3.items() if key not in keys}


# Changes to the config.json of a tied or an untied base that must give transformers' logits.
SAME = {
    "silu by its other name": {"hidden_act": "swish"},
    "no hidden_act": {"hidden_act": GONE},
    "no biases named": {"attention_bias": GONE, "mlp_bias": GONE},
    "a key norm's epsilon": {"rms_norm_eps": 0.1},
    "no epsilon": {"rms_norm_eps": GONE},
    "old spelling": {"rope_scaling": {"type": "llama3", **without("rope_type")}},
    "both names of the type": {"rope_scaling": {"type": "linear", **LLAMA3}},
    "new spelling": {"rope_theta": GONE, "rope_scaling": GONE, "rope_parameters": {"rope_theta": 9e3, **LLAMA3}},
    "new spelling, default": {"rope_scaling": GONE, "rope_parameters": {"rope_theta": 2e4, "rope_type": "default"}},
    "theta contradicts, new spelling": {"rope_scaling": GONE, "rope_parameters": {"rope_theta": 7.0, **LLAMA3}},
    "theta contradicts, old spelling": {"rope_scaling": {"rope_theta": 7.0, **LLAMA3}},
    "both spellings, alike": {"rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 500_000.0, **LLAMA3}},
    "no theta": {"rope_theta": GONE},
    "no theta, no scaling": {"rope_theta": GONE, "rope_scaling": None},
    "another theta": {"rope_theta": 100.0},
    "a whole theta": {"rope_theta": 10_000},
    "no scaling": {"rope_scaling": None},
    "empty scaling": {"rope_scaling": {}},
    "empty parameters": {"rope_parameters": {}},
    "null parameters": {"rope_parameters": None},
    "default scaling": {"rope_scaling": {"rope_type": "default"}},
    "original length from the whole": {"rope_scaling": without("original_max_position_embeddings")},
    "original length at the top, alike": {"original_max_position_embeddings": 64},
    "another factor": {"rope_scaling": LLAMA3 | {"factor": 4}},
    "partial rotary factor of one": {"partial_rotary_factor": 1.0},
    "no head_dim": {"head_dim": GONE},
    "null head_dim": {"head_dim": None},
    "sliding window": {"sliding_window": 4},
    "tensor parallel pretraining": {"pretraining_tp": 2},
    "another dtype": {"torch_dtype": "float16"},
    "the new name of dtype": {"dtype": "bfloat16"},
    "no architectures": {"architectures": GONE},
    "null architectures": {"architectures": None},
    "neutral Granite": {"embedding_multiplier": 1.0, "logits_scaling": 1, "residual_multiplier": None},
    "one expert": {"num_local_experts": 1},
    "attention dropout": {"attention_dropout": 0.1},
    "layers that see all": {"layer_types": ["full_attention", "full_attention"]},
    "no quantization": {"quantization_config": None},
    "keys that mean nothing": {"_name_or_path": "x", "use_cache": False, "transformers_version": "4.45", "unsloth": 1},
}
UNTIED_SAME = {
    "untied": {},
    "tied is not said": {"tie_word_embeddings": GONE},
    "several end tokens": {"eos_token_id": [1, 2]},
}
# Changes that must be refused, and words of the error beside the file.
REFUSED = {
    "gelu": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "null activation": ({"hidden_act": None}, "hidden_act is None"),
    "activation is a list": ({"hidden_act": ["silu"]}, "hidden_act is ['silu']"),
    "attention bias": ({"attention_bias": True}, "attention_bias is True"),
    "attention bias as text": ({"attention_bias": "false"}, "attention_bias is 'false'"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias is True"),
    "linear": ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling.rope_type is 'linear'"),
    "linear, old": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type is 'linear'"),
    "dynamic": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type is 'dynamic'"),
    "yarn": ({"rope_scaling": None, "rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
             "rope_parameters.rope_type is 'yarn'"),
    "longrope": ({"rope_scaling": {"type": "longrope"}}, "rope_scaling.type is 'longrope'"),
    "su": ({"rope_scaling": {"type": "su"}}, "rope_scaling.type is 'su'"),
    "rope type is null": ({"rope_scaling": LLAMA3 | {"rope_type": None}}, "rope_scaling.rope_type is None"),
    "rope type is a list": ({"rope_scaling": LLAMA3 | {"rope_type": ["llama3"]}},
                            "rope_scaling.rope_type is ['llama3']"),
    "spellings contradict": ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
                             "rope_parameters and rope_scaling"),
    "nested by layers": ({"rope_scaling": None, "rope_parameters": {"full_attention": LLAMA3}},
                         "rope_parameters.full_attention is {"),
    "scaling is text": ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3'"),
    "scaling is a list": ({"rope_scaling": [LLAMA3]}, "rope_scaling is [{"),
    "parameters are a number": ({"rope_parameters": 3}, "rope_parameters is 3"),
    "no factor": ({"rope_scaling": without("factor")}, "rope_scaling.factor is missing"),
    "no low factor": ({"rope_scaling": without("low_freq_factor")}, "rope_scaling.low_freq_factor is missing"),
    "factor as text": ({"rope_scaling": LLAMA3 | {"factor": "32"}}, "rope_scaling.factor is '32'"),
    "factor of zero": ({"rope_scaling": LLAMA3 | {"factor": 0}}, "rope_scaling.factor is 0"),
    "factor is NaN": ({"rope_scaling": LLAMA3 | {"factor": math.nan}}, "rope_scaling.factor is nan"),
    "equal factors": ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "rope_scaling.high_freq_factor is 1.0"),
    "original lengths contradict": ({"original_max_position_embeddings": 32}, "original_max_position_embeddings is 32"),
    "null original length": ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": None}},
                             "rope_scaling.original_max_position_embeddings is None"),
    "half a rotation": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "half a rotation, inside": ({"rope_scaling": LLAMA3 | {"partial_rotary_factor": 0.5}},
                                "rope_scaling.partial_rotary_factor is 0.5"),
    "null theta": ({"rope_theta": None}, "rope_theta is None"),
    "theta as text": ({"rope_theta": "500000"}, "rope_theta is '500000'"),
    "infinite theta": ({"rope_theta": math.inf}, "rope_theta is inf"),
    "theta beyond float32": ({"rope_theta": 1e39}, "rope_theta is 1e+39"),
    "theta beyond floats": ({"rope_theta": 10**400}, "rope_theta is 1000"),
    "negative theta": ({"rope_theta": -1.0}, "rope_theta is -1.0"),
    "epsilon of zero": ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
    "epsilon as text": ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
    "null epsilon": ({"rms_norm_eps": None}, "rms_norm_eps is None"),
    "odd head_dim": ({"head_dim": 7}, "head_dim is 7"),
    "head_dim as text": ({"head_dim": "8"}, "head_dim is '8'"),
    "head_dim as a fraction": ({"head_dim": 8.0}, "head_dim is 8.0"),
    "heads do not divide the width": ({"num_attention_heads": 5}, "num_attention_heads is 5"),
    "keys do not divide the heads": ({"num_key_value_heads": 3}, "num_key_value_heads is 3"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    "heads are true": ({"num_attention_heads": True}, "num_attention_heads is True"),
    "heads are a list": ({"num_attention_heads": [4]}, "num_attention_heads is [4]"),
    "no width": ({"hidden_size": GONE}, "hidden_size is missing"),
    "negative layers": ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
    "a billion layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    "no vocabulary": ({"vocab_size": None}, "vocab_size is None"),
    "a huge context": ({"max_position_embeddings": 2**40}, "max_position_embeddings is 1099511627776"),
    "context as text": ({"max_position_embeddings": "512"}, "max_position_embeddings is '512'"),
    "null tie": ({"tie_word_embeddings": None}, "tie_word_embeddings is None"),
    "tie as text": ({"tie_word_embeddings": "true"}, "tie_word_embeddings is 'true'"),
    "Granite's scales": ({"embedding_multiplier": 12.0}, "embedding_multiplier is 12.0"),
    "Granite's attention": ({"attention_multiplier": 0.0078125}, "attention_multiplier is 0.0078125"),
    "scaled logits": ({"logits_scaling": 8}, "logits_scaling is 8"),
    "capped logits": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    "experts": ({"num_local_experts": 8}, "num_local_experts is 8"),
    "experts by another name": ({"n_routed_experts": 64}, "n_routed_experts is 64"),
    "layers that see a window": ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is ["),
    "layers are a number": ({"layer_types": 3}, "layer_types is 3"),
    "layers without rope": ({"no_rope_layers": [1, 0]}, "no_rope_layers is [1, 0]"),
    "a classifier": ({"architectures": ["LlamaForSequenceClassification"]}, "architectures is ['LlamaForSeq"),
    "another network": ({"architectures": ["GraniteForCausalLM"]}, "architectures is ['GraniteForCausalLM']"),
    "architectures are text": ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM'"),
    "another model": ({"model_type": "mistral"}, "model_type is 'mistral'"),
    "no model": ({"model_type": GONE}, "model_type is missing"),
    "model is a list": ({"model_type": ["llama"]}, "model_type is ['llama']"),
    "GPTQ": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.quant_method is 'gptq'"),
    "8 bits": ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
               "quantization_config.load_in_8bit is True"),
    "quantization is text": ({"quantization_config": "nf4"}, "quantization_config is 'nf4'"),
    "quantization is a list": ({"quantization_config": []}, "quantization_config is []"),
}  # fmt: skip
FILES = {
    "an array": "[1, 2]",
    "a number": "3",
    "nothing": "",
    "a word": "null",
    "nested without end": "[" * 100_000,
    "a cut file": '{"model_type": "llama"',
    "no text": b"\xff\xfe\x00",
    "a number too long": '{"rope_theta": ' + "1" * 5000 + "}",
}


def write_variant(base, folder, changes: dict):
    shutil.copytree(base, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not GONE}))
    return folder


@torch.no_grad()
def assert_same_logits(base_dir):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32).eval()
    ours = load_ours(base_dir)
    tokens = torch.randint(0, 384, (1, 100), generator=torch.Generator().manual_seed(0))
    logits = ours.compute_hidden(tokens) @ ours.head_weight.T
    torch.testing.assert_close(logits, theirs(tokens).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("changes", SAME.values(), ids=SAME)
def test_a_config_that_is_read_gives_transformers_logits(changes, tiny_base, tmp_path):
    assert_same_logits(write_variant(tiny_base, tmp_path / "base", changes))


@pytest.mark.parametrize("changes", UNTIED_SAME.values(), ids=UNTIED_SAME)
def test_an_untied_config_that_is_read_gives_transformers_logits(changes, tiny_untied_base, tmp_path):
    assert_same_logits(write_variant(tiny_untied_base, tmp_path / "base", changes))


SHAPES = {
    "a head width of its own": vars(TINY_TIED) | {"head_dim": 16},
    "as many keys as queries": vars(TINY_UNTIED) | {"num_kv_heads": 4},
    "one key": vars(TINY_UNTIED) | {"num_kv_heads": 1},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes_are_read_as_transformers_reads_them(shape, tmp_path):
    assert_same_logits(write_tiny_base(tmp_path / "base", Architecture(**shape)))


def test_without_a_number_of_keys_there_are_as_many_as_queries(tmp_path):
    base = write_tiny_base(tmp_path / "own", Architecture(**SHAPES["as many keys as queries"]))
    for number, missing in enumerate((GONE, None)):
        assert_same_logits(write_variant(base, tmp_path / str(number), {"num_key_value_heads": missing}))


@pytest.mark.parametrize(("changes", "said"), REFUSED.values(), ids=REFUSED)
def test_what_would_be_computed_otherwise_is_refused_with_file_key_and_value(changes, said, tiny_base, tmp_path):
    base_dir = write_variant(tiny_base, tmp_path / "base", changes)
    with pytest.raises(ValueError) as refused:
        open_base(base_dir)
    message = str(refused.value)
    assert f"{base_dir}/config.json: {said}" in message and "\n" not in message and len(message) < 400


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_a_file_that_is_no_object_is_refused_in_one_line(content, tiny_base, tmp_path):
    base_dir = shutil.copytree(tiny_base, tmp_path / "base")
    (base_dir / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as refused:
        open_base(base_dir)
    assert f"{base_dir}/config.json" in str(refused.value) and "\n" not in str(refused.value)


def test_every_key_that_is_written_is_read_back(tmp_path):
    from tune2gguf.model.architectures import read_architecture

    for number, architecture in enumerate((TINY_TIED, TINY_UNTIED)):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "config.json").write_text(json.dumps(make_hf_config(architecture)))
        assert read_architecture(tmp_path / str(number)) == architecture
