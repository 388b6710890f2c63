"""Small models with the same bytes on every machine, to compare GGUF files by digest.

Weights come from a hash. The adapter's are multiples of 1/512: their product is exact in float32, in any order of
summation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.conftest import TINY_UNTIED, write_tiny_base
from tests.runs import copy_real_run, set_adapter
from tests.tokenizer_files import fetch_or_skip
from tune2gguf.base.bfloat16 import narrow_to_bfloat16, round_to_bfloat16
from tune2gguf.base.from_gguf import convert_gguf_to_hf
from tune2gguf.base.layout import list_tensors
from tune2gguf.base.pypi import SMOLLM2_GGUF
from tune2gguf.model.architectures import (
    LLAMA3_1_8B,
    LLAMA3_2_1B,
    SMOLLM2_135M,
    Architecture,
    make_hf_config,
    read_architecture,
)
from tune2gguf.tokenizer.llama3 import LLAMA3_PATTERN
from tune2gguf.tokenizer.templates import CHAT_TEMPLATES

RANK, ALPHA = 8, 16
REAL_MODEL = "SmolLM2-135M-Instruct"
LLAMA3_SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHATML_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@dataclass(frozen=True)
class SmallModel:
    """A model with the features of a supported family. Its name is also its folders' name."""

    name: str
    architecture: Architecture
    chat_template: str


def _shrink(architecture: Architecture, **changes: int) -> Architecture:
    return Architecture(**{**vars(architecture), "vocab_size": 288, "max_position_embeddings": 512, **changes})


# True K-quant widths with grouped-query factors of 4 and 2, and SmolLM2's columns, which need the fallback types. With
# more than ten layers, the order by number differs from the order by name.
SMALL_MODELS = (
    SmallModel(
        "Small-Llama-3.2-Instruct",
        _shrink(
            LLAMA3_2_1B, num_layers=8, num_heads=8, num_kv_heads=2, embed_dim=256, intermediate_dim=256, head_dim=32
        ),
        "llama3",
    ),
    SmallModel(
        "Small-Llama-3.1-Instruct",
        _shrink(
            LLAMA3_1_8B, num_layers=5, num_heads=4, num_kv_heads=2, embed_dim=256, intermediate_dim=512, head_dim=64
        ),
        "llama3",
    ),
    SmallModel(
        "Small-SmolLM2-Instruct",
        _shrink(SMOLLM2_135M, num_layers=12, num_heads=3, num_kv_heads=1, embed_dim=192, intermediate_dim=320),
        "chatml",
    ),
)


def write_small_run(model: SmallModel, folder: Path) -> Path:
    """Write the base to `folder/base` and a run with an adapter on all linear layers to `folder/NAME`; return it."""
    _write_base(model, folder / "base")
    return write_run(folder / "base", folder / model.name, chat_template=model.chat_template)


def write_run(
    base_dir: Path,
    run_dir: Path,
    *overrides: str,
    chat_template: str,
    strength: float = 1,
    **rows: Sequence[dict],
) -> Path:
    """Write a run on this base. Its adapter, on all linear layers, has exact weights.

    Args:
        strength: factor of the adapter's weights; a power of two keeps them exact
        rows: `training` and `validation`; without validation the run has no best/
    """
    common = (f"chat_template={chat_template}", "quantization=Q4_K_M", f"lora_rank={RANK}", f"lora_alpha={ALPHA}")
    copy_real_run(base_dir, run_dir, *common, *overrides, **rows)
    set_adapter(run_dir, draw_adapter(read_architecture(base_dir), strength), rank=RANK, alpha=ALPHA)
    return run_dir


def write_smollm2_run(folder: Path, *, validation: Sequence[dict] = ()) -> Path:
    """Write the real SmolLM2 to `folder/base`, and a run to `folder/SmolLM2-135M-Instruct`; return it.

    The adapter is weak: the model still answers.
    """
    base_dir = convert_gguf_to_hf(fetch_or_skip(SMOLLM2_GGUF), folder / "base")
    return write_run(base_dir, folder / REAL_MODEL, chat_template="chatml", strength=2**-6, validation=validation)


def write_biased_base(base_dir: Path, find_bias: Callable[[str], float]) -> Path:
    """Write an untied random base with a bias on each token's logit, through a direction that all hidden states share.

    Args:
        find_bias: token's text in the vocabulary -> bias, in about standard deviations of the logits
    """
    from safetensors.torch import load_file, save_file

    write_tiny_base(base_dir, TINY_UNTIED)
    tokenizer = json.loads((base_dir / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    weights = load_file(base_dir / "model.safetensors")
    weights["model.embed_tokens.weight"][:, 0] = 1.0
    for name, weight in weights.items():
        if "o_proj" in name or "down_proj" in name:
            weight[0] = 0
    weights["model.norm.weight"][0] = 1.0
    for token, number in ids.items():
        weights["lm_head.weight"][number, 0] = find_bias(token)
    save_file(weights, base_dir / "model.safetensors")
    return base_dir


def draw_integers(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return integers in [-128, 127] as float32. They depend on the name only."""
    data = hashlib.shake_256(name.encode()).digest(int(np.prod(shape)))
    return np.frombuffer(data, np.int8).astype(np.float32).reshape(shape)


def _draw_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    # The cube gives a few large weights among many small ones, like in trained models.
    values = (draw_integers(name, shape) / 128) ** 3 / 4
    return 1 + values if len(shape) == 1 else values


def _write_base(model: SmallModel, base_dir: Path) -> None:
    import torch
    from safetensors.torch import save_file

    base_dir.mkdir(parents=True)
    bits = {
        spec.hf_name: narrow_to_bfloat16(round_to_bfloat16(_draw_weight(spec.hf_name, spec.shape)))
        for spec in list_tensors(model.architecture)
    }
    weights = {name: torch.from_numpy(values.astype(np.int16)).view(torch.bfloat16) for name, values in bits.items()}
    save_file(weights, base_dir / "model.safetensors", metadata={"format": "pt"})
    chat_template = CHAT_TEMPLATES[model.chat_template]
    specials = LLAMA3_SPECIALS if model.chat_template == "llama3" else CHATML_SPECIALS
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>" if model.chat_template == "llama3" else "<|im_start|>",
        "eos_token": chat_template.end_of_turn,
        "chat_template": chat_template.jinja_template,
    }
    for name, content in (
        ("config.json", make_hf_config(model.architecture) | {"torch_dtype": "bfloat16"}),
        ("generation_config.json", {"do_sample": True, "temperature": 0.6, "top_p": 0.9}),
        ("tokenizer.json", _make_tokenizer(model.architecture.vocab_size, specials)),
        ("tokenizer_config.json", tokenizer_config),
    ):
        (base_dir / name).write_text(json.dumps(content))


def _make_tokenizer(vocab_size: int, specials: list[str]) -> dict:
    """Make a byte-level BPE with Llama 3's or SmolLM2's pre-tokenizer, two merges, and ids without a token."""
    from tokenizers import pre_tokenizers

    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [["t", "h"], ["th", "e"]]
    tokens = [*characters, *("".join(merge) for merge in merges)]
    is_llama3 = specials is LLAMA3_SPECIALS
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False}
    first = split if is_llama3 else {"type": "Digits", "individual_digits": True}
    added = [
        {"id": len(tokens) + number, "content": token, "special": True, "normalized": False}
        | {"single_word": False, "lstrip": False, "rstrip": False}
        for number, token in enumerate(specials)
    ]
    assert len(tokens) + len(added) < vocab_size
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [first, byte_level | {"use_regex": not is_llama3}]},
        "post_processor": _make_post_processor(added[0]["id"]) if is_llama3 else byte_level | {"use_regex": True},
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": is_llama3,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def _make_post_processor(bos_id: int) -> dict:
    """Return Llama 3's post-processor: BOS before each sequence."""
    bos = "<|begin_of_text|>"
    parts = {
        kind: [{"SpecialToken": {"id": bos, "type_id": number}}, {"Sequence": {"id": name, "type_id": number}}]
        for number, (kind, name) in enumerate((("A", "A"), ("B", "B")))
    }
    template = {
        "type": "TemplateProcessing",
        "single": parts["A"],
        "pair": parts["A"] + parts["B"],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    return {"type": "Sequence", "processors": [byte_level, template]}


def draw_adapter(architecture: Architecture, strength: float = 1) -> dict[str, np.ndarray]:
    """Return the weights of an adapter on all linear layers, in PEFT's layout."""
    weights = {}
    for spec in list_tensors(architecture):
        if spec.is_linear:
            module = "base_model.model." + spec.hf_name.removesuffix(".weight")
            # Products are multiples of 2^-18 up to 2^-4: the sum of eight is exact in float32.
            shape_a, shape_b = (RANK, spec.shape[1]), (spec.shape[0], RANK)
            weights[f"{module}.lora_A.weight"] = draw_integers(f"{module} A", shape_a) / 512 * strength
            weights[f"{module}.lora_B.weight"] = draw_integers(f"{module} B", shape_b) / 512
    return weights
