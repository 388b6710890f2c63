import json
from pathlib import Path

import gguf
import numpy
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from tests.conftest import TINY_UNTIED, write_tiny_tokenizer
from tune2gguf.base.checkpoint import open_base
from tune2gguf.base.from_gguf import convert_gguf_to_hf
from tune2gguf.model.architectures import Architecture, read_architecture

TINY = Architecture(**{**vars(TINY_UNTIED), "tied": True, "norm_eps": 1e-5, "rope_base": 100_000.0})
TEXTS = [
    "Reed Quay at 7:45, 1024 coins",
    "  two  spaces\n\nlines",
    "Fähre 渡し船 🛶",
    "<|im_start|>user\nhi<|im_end|>\n",
]


def list_gguf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    a = architecture
    query, key = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    shapes = {"token_embd.weight": (a.vocab_size, a.embed_dim), "output_norm.weight": (a.embed_dim,)}
    for i in range(a.num_layers):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (a.embed_dim,),
            f"blk.{i}.ffn_norm.weight": (a.embed_dim,),
            f"blk.{i}.attn_q.weight": (query, a.embed_dim),
            f"blk.{i}.attn_k.weight": (key, a.embed_dim),
            f"blk.{i}.attn_v.weight": (key, a.embed_dim),
            f"blk.{i}.attn_output.weight": (a.embed_dim, query),
            f"blk.{i}.ffn_gate.weight": (a.intermediate_dim, a.embed_dim),
            f"blk.{i}.ffn_up.weight": (a.intermediate_dim, a.embed_dim),
            f"blk.{i}.ffn_down.weight": (a.embed_dim, a.intermediate_dim),
        }
    return shapes


def write_gguf(
    path: Path, tokenizer_dir: Path, *, pre: str = "smollm", name: str = "llama", skipped: str = ""
) -> dict[str, numpy.ndarray]:
    """Write a GGUF of TINY with Q8_0 matrices; return its dequantized tensors."""
    writer = gguf.GGUFWriter(path, name)
    writer.add_block_count(TINY.num_layers)
    writer.add_context_length(TINY.max_position_embeddings)
    writer.add_embedding_length(TINY.embed_dim)
    writer.add_feed_forward_length(TINY.intermediate_dim)
    writer.add_head_count(TINY.num_heads)
    writer.add_head_count_kv(TINY.num_kv_heads)
    writer.add_rope_freq_base(TINY.rope_base)
    writer.add_layer_norm_rms_eps(TINY.norm_eps)
    content = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    vocabulary = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json")).get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    special = {token["content"] for token in content["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
    writer.add_bos_token_id(vocabulary["<|im_start|>"])
    writer.add_eos_token_id(vocabulary["<|im_end|>"])
    writer.add_chat_template("{{ messages }}")
    random, values = numpy.random.default_rng(0), {}
    for tensor, shape in list_gguf_shapes(TINY).items():
        weight = random.standard_normal(shape).astype(numpy.float32)
        quantization = gguf.GGMLQuantizationType.F32 if len(shape) == 1 else gguf.GGMLQuantizationType.Q8_0
        data = gguf.quantize(weight, quantization)
        values[tensor] = gguf.dequantize(data, quantization).reshape(shape)
        if tensor != skipped:
            writer.add_tensor(tensor, data, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.fixture
def tokenizer_dir(tmp_path) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    write_tiny_tokenizer(folder)
    return folder


def test_float32_base_holds_the_dequantized_values_in_torchtunes_order(tmp_path, tokenizer_dir):
    values = write_gguf(tmp_path / "m.gguf", tokenizer_dir)
    base = open_base(convert_gguf_to_hf(tmp_path / "m.gguf", tmp_path / "base", dtype="float32"))
    assert base.architecture == TINY == read_architecture(tmp_path / "base")
    names = {"attn.q_proj": "attn_q", "attn.k_proj": "attn_k", "attn.output_proj": "attn_output", "mlp.w2": "ffn_down"}
    for tune, name in names.items():
        expected = torch.from_numpy(values[f"blk.1.{name}.weight"])
        assert torch.equal(base.read_tensor(f"layers.1.{tune}.weight"), expected)
    assert torch.equal(base.read_tensor("tok_embeddings.weight"), torch.from_numpy(values["token_embd.weight"]))


def test_query_rows_are_put_into_hugging_faces_order(tmp_path, tokenizer_dir):
    values = write_gguf(tmp_path / "m.gguf", tokenizer_dir)
    convert_gguf_to_hf(tmp_path / "m.gguf", tmp_path / "base", dtype="float32")
    stored = load_file(tmp_path / "base" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"].numpy()
    query = values["blk.0.attn_q.weight"]
    # llama.cpp's converter, the other direction: HF rows [heads, 2, half] become [heads, half, 2].
    forwards = stored.reshape(TINY.num_heads, 2, TINY.head_dim // 2, -1).swapaxes(1, 2).reshape(stored.shape)
    assert numpy.array_equal(forwards, query) and not numpy.array_equal(stored, query)


def test_bfloat16_base_is_the_float32_one_rounded_once(tmp_path, tokenizer_dir):
    write_gguf(tmp_path / "m.gguf", tokenizer_dir)
    rounded, exact = (
        load_file(convert_gguf_to_hf(tmp_path / "m.gguf", tmp_path / dtype, dtype=dtype) / "model.safetensors")
        for dtype in ("bfloat16", "float32")
    )
    assert all(torch.equal(rounded[name], exact[name].bfloat16()) for name in exact)


def test_rebuilt_tokenizer_gives_the_same_ids(tmp_path, tokenizer_dir):
    write_gguf(tmp_path / "m.gguf", tokenizer_dir)
    base_dir = convert_gguf_to_hf(tmp_path / "m.gguf", tmp_path / "base")
    original, rebuilt = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (tokenizer_dir, base_dir))
    for text in TEXTS:
        assert rebuilt.encode(text).ids == original.encode(text).ids
        assert rebuilt.decode(rebuilt.encode(text).ids, skip_special_tokens=False) == text
    config = json.loads((base_dir / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert config["chat_template"] == "{{ messages }}"


def test_transformers_loads_the_folder(tmp_path, tokenizer_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_gguf(tmp_path / "m.gguf", tokenizer_dir)
    base_dir = convert_gguf_to_hf(tmp_path / "m.gguf", tmp_path / "base")
    tokens = AutoTokenizer.from_pretrained(base_dir)("Reed Quay", return_tensors="pt")
    assert AutoModelForCausalLM.from_pretrained(base_dir)(**tokens).logits.shape[-1] == TINY.vocab_size


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"pre": "llama-bpe"}, "tokenizer.ggml.pre is 'llama-bpe'"),
        ({"name": "qwen2"}, "architecture is 'qwen2'"),
        ({"skipped": "blk.1.ffn_up.weight"}, r"lacks 1 tensors, among them 'blk\.1\.ffn_up\.weight'"),
    ],
)
def test_unsupported_gguf_is_refused_and_nothing_written(tmp_path, tokenizer_dir, changed, said):
    write_gguf(tmp_path / "m.gguf", tokenizer_dir, **changed)
    with pytest.raises(ValueError, match=said):
        convert_gguf_to_hf(tmp_path / "m.gguf", tmp_path / "models" / "base")
    assert not (tmp_path / "models").exists()


def test_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUX" + bytes(100))
    with pytest.raises(ValueError, match="cannot be read as GGUF"):
        convert_gguf_to_hf(tmp_path / "m.gguf", tmp_path / "base")


def test_existing_folder_is_refused_before_the_gguf_is_read(tmp_path):
    with pytest.raises(ValueError, match="exists already and is not overwritten"):
        convert_gguf_to_hf(tmp_path / "missing.gguf", tmp_path)
