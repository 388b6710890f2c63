"""Dense Llama architectures: the dimensions in which config.json and the model builder must agree."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from tune2gguf.files.json_files import JsonObject, read_json


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling of rotary embeddings (`rope_type: llama3` in config.json)."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class Architecture:
    """The dimensions of a dense Llama decoder, in elements. `tied`: the output head is the token embedding."""

    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    embed_dim: int
    intermediate_dim: int
    head_dim: int
    max_position_embeddings: int
    tied: bool
    norm_eps: float = 1e-5
    rope_base: float = 500_000.0
    rope_scaling: RopeScaling | None = None


LLAMA3_2_1B = Architecture(
    vocab_size=128_256,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    embed_dim=2048,
    intermediate_dim=8192,
    head_dim=64,
    max_position_embeddings=131_072,
    tied=True,
    rope_scaling=RopeScaling(factor=32.0),
)
LLAMA3_2_3B = Architecture(
    vocab_size=128_256,
    num_layers=28,
    num_heads=24,
    num_kv_heads=8,
    embed_dim=3072,
    intermediate_dim=8192,
    head_dim=128,
    max_position_embeddings=131_072,
    tied=True,
    rope_scaling=RopeScaling(factor=32.0),
)
LLAMA3_1_8B = Architecture(
    vocab_size=128_256,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    embed_dim=4096,
    intermediate_dim=14_336,
    head_dim=128,
    max_position_embeddings=131_072,
    tied=False,
    rope_scaling=RopeScaling(factor=8.0),
)
SMOLLM2_135M = Architecture(
    vocab_size=49_152,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    embed_dim=576,
    intermediate_dim=1536,
    head_dim=64,
    max_position_embeddings=8192,
    tied=True,
    rope_base=100_000.0,
)

ARCHITECTURES = {
    "llama3_2_1b": LLAMA3_2_1B,
    "llama3_2_3b": LLAMA3_2_3B,
    "llama3_1_8b": LLAMA3_1_8B,
    "smollm2_135m": SMOLLM2_135M,
}

# Key in config.json -> field of Architecture.
_HF_FIELDS = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "hidden_size": "embed_dim",
    "intermediate_size": "intermediate_dim",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
    "tie_word_embeddings": "tied",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_base",
}

# Keys that change the forward pass, with the supported values. A missing key means transformers' default, which is
# always supported. transformers ignores other architectures' keys in a Llama's config.json; here they are refused,
# because their author meant them.
_COMPUTED = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (None, 1),
    "architectures": (None, ["LlamaForCausalLM"], ["LLaMAForCausalLM"]),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"), (None, 1)),
    **dict.fromkeys(("attention_multiplier", "query_pre_attn_scalar", "scale_emb", "scale_depth"), (None,)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "no_rope_layers"), (None,)),
    **dict.fromkeys(("use_qk_norm", "qk_layernorm", "use_bidirectional_attention"), (None, False)),
    "is_causal": (None, True),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), (None, 0, 1)),
}
_COMPUTED_HERE = "only a dense Llama is supported: SiLU, no biases, RoPE over whole heads, no experts, no extra scaling"
_MAX_WHOLE, _MAX_FLOAT = 2**31 - 1, 3.4e38  # GGUF's limits
_MAX_LAYERS = 512  # llama.cpp's limit
_TRANSFORMERS_THETA, _TRANSFORMERS_EPS = 10_000.0, 1e-6  # transformers' defaults


def read_architecture(base_dir: str | Path) -> Architecture:
    """Read the architecture from a base folder's config.json, as transformers does.

    Raises:
        ValueError: if config.json is missing, is no JSON object, or asks for an unsupported forward pass; it names
            file, key and value
    """
    path = Path(base_dir) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: not found; a base folder needs config.json, the weights and a tokenizer")
    config = JsonObject(path, read_json(path))
    if config.values.get("model_type") != "llama":
        config.refuse("model_type", "only dense 'llama' models are supported")
    _check_computed(config, _COMPUTED)
    layer_types = config.values.get("layer_types")
    if layer_types is not None and (
        not isinstance(layer_types, list) or set(map(str, layer_types)) - {"full_attention"}
    ):
        config.refuse("layer_types", "only full causal attention is supported")
    if not isinstance(config.values.get("tie_word_embeddings", False), bool):
        config.refuse("tie_word_embeddings", "it must be true or false")
    rope_base, rope_scaling = _read_rope(config)
    return Architecture(
        vocab_size=config.read("vocab_size", int, maximum=_MAX_WHOLE),
        num_layers=config.read("num_hidden_layers", int, maximum=_MAX_LAYERS),
        **_read_heads(config),
        intermediate_dim=config.read("intermediate_size", int, maximum=_MAX_WHOLE),
        max_position_embeddings=config.read("max_position_embeddings", int, maximum=_MAX_WHOLE),
        tied=config.values.get("tie_word_embeddings", False),
        norm_eps=config.read("rms_norm_eps", float, minimum=1e-30, maximum=_MAX_FLOAT, default=_TRANSFORMERS_EPS),
        rope_base=rope_base,
        rope_scaling=rope_scaling,
    )


def _check_computed(config: JsonObject, computed: dict[str, tuple]) -> None:
    for key, values in computed.items():
        if key in config.values and config.values[key] not in values:
            config.refuse(key, _COMPUTED_HERE)


def _read_heads(config: JsonObject) -> dict[str, int]:
    given = JsonObject(config.path, {key: value for key, value in config.values.items() if value is not None})
    embed_dim = config.read("hidden_size", int, maximum=_MAX_WHOLE)
    num_heads = config.read("num_attention_heads", int, maximum=_MAX_WHOLE)
    num_kv_heads = given.read("num_key_value_heads", int, maximum=num_heads, default=num_heads)
    head_dim = given.read("head_dim", int, minimum=2, maximum=_MAX_WHOLE, default=embed_dim // num_heads)
    if embed_dim % num_heads:
        config.refuse("num_attention_heads", f"it must divide hidden_size={embed_dim}")
    if num_heads % num_kv_heads:
        config.refuse("num_key_value_heads", f"it must divide num_attention_heads={num_heads}")
    if head_dim % 2:
        config.refuse("head_dim", "it must be even, because RoPE rotates pairs of channels")
    return {"embed_dim": embed_dim, "num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}


def _read_rope(config: JsonObject) -> tuple[float, RopeScaling | None]:
    """Return RoPE's base and scaling, from `rope_parameters` (transformers 5) or `rope_scaling` (before).

    A nested rope_theta wins over a top-level one, as in transformers 5 and llama.cpp's converter. If both keys are
    present they must agree: transformers reads the old one, the converter may read the new one.
    """
    spellings = {name: config.open(name) for name in ("rope_parameters", "rope_scaling")}
    found = {name: _read_spelling(config, rope) for name, rope in spellings.items() if rope is not None}
    if len(found) == 2 and found["rope_parameters"] != found["rope_scaling"]:
        values = " and ".join(f"{name}={config.values[name]}" for name in found)
        raise ValueError(f"{config.path}: rope_parameters and rope_scaling contradict each other: {values}; remove one")
    return next(iter(found.values())) if found else (_read_theta(config), None)


def _read_theta(config: JsonObject, default: float = _TRANSFORMERS_THETA) -> float:
    return config.read("rope_theta", float, minimum=1e-30, maximum=_MAX_FLOAT, default=default)


def _read_spelling(config: JsonObject, rope: JsonObject) -> tuple[float, RopeScaling | None]:
    for key, value in rope.values.items():
        if isinstance(value, dict):
            rope.refuse(key, "only one rotary embedding for all layers is supported")
    _check_computed(rope, {"partial_rotary_factor": _COMPUTED["partial_rotary_factor"]})
    base = _read_theta(rope) if "rope_theta" in rope.values else _read_theta(config)
    type_key = "rope_type" if "rope_type" in rope.values else "type"
    rope_type = rope.values.get(type_key, "default")
    if rope_type == "default":
        return base, None
    if rope_type != "llama3":
        rope.refuse(type_key, "only 'llama3' and 'default' are supported")
    low, high = (rope.read(f"{end}_freq_factor", float, minimum=1e-30, maximum=_MAX_FLOAT) for end in ("low", "high"))
    if high <= low:
        rope.refuse("high_freq_factor", f"it must be above low_freq_factor={low}")
    length = "original_max_position_embeddings"
    original = rope.read(length, int, maximum=_MAX_WHOLE, default=config.values.get("max_position_embeddings"))
    if config.values.get(length, original) != original:
        config.refuse(length, f"it must equal {rope.prefix}{length}={original}")
    factor = rope.read("factor", float, minimum=1e-30, maximum=_MAX_FLOAT)
    return base, RopeScaling(factor, low, high, original)


def make_hf_config(architecture: Architecture) -> dict:
    """Return the config.json content of a Hugging Face Llama with this architecture."""
    values = asdict(architecture)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    config |= {name: values[field] for name, field in _HF_FIELDS.items()}
    config |= {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_scaling": None}
    if architecture.rope_scaling is not None:
        config["rope_scaling"] = {"rope_type": "llama3", **asdict(architecture.rope_scaling)}
    return config


def check_architecture(name: str, found: Architecture, base_dir: str | Path) -> None:
    """Compare a base folder's architecture with the named one.

    Raises:
        ValueError: if they differ; one line per field
    """
    differences = [
        f"{field}: the model builder has {value!r}, config.json has {getattr(found, field)!r}"
        for field, value in vars(ARCHITECTURES[name]).items()
        if getattr(found, field) != value
    ]
    if differences:
        raise ValueError(f"{base_dir}: not a {name} model:\n  " + "\n  ".join(differences))
