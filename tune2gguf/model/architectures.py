"""The dense Llama architectures: the numbers that a checkpoint's config.json and the model builder must agree on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling of rotary embeddings (`rope_type: llama3` in config.json)."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class Architecture:
    """A dense Llama decoder. Widths in elements; `tied` means that the output head is the token embedding."""

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

# config.json's name -> the field here.
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


def read_architecture(base_dir: str | Path) -> Architecture:
    """Read the architecture from a base folder's config.json.

    Raises:
        ValueError: if config.json is missing, is not JSON, is not a dense Llama, or lacks a field
    """
    path = Path(base_dir) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: not found; a base folder needs config.json, the weights and a tokenizer") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if config.get("model_type") != "llama":
        raise ValueError(f"{path}: model_type is {config.get('model_type')!r}; only dense 'llama' models are supported")
    # Newer transformers write rope_theta inside rope_parameters; older ones beside rope_scaling.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    config = {"rope_theta": rope.get("rope_theta"), **config} if "rope_theta" in rope else config
    config.setdefault("num_key_value_heads", config.get("num_attention_heads"))
    if config.get("head_dim") is None and config.get("num_attention_heads"):
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    config.setdefault("tie_word_embeddings", False)
    missing = [name for name in _HF_FIELDS if config.get(name) is None]
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(missing)}")
    values = {field: config[name] for name, field in _HF_FIELDS.items()}
    return Architecture(**values, rope_scaling=_read_rope_scaling(rope, path))


def _read_rope_scaling(rope: dict, path: Path) -> RopeScaling | None:
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return None
    if rope_type != "llama3":
        raise ValueError(f"{path}: rope scaling {rope_type!r} is not supported; 'llama3' and none are")
    return RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_max_position_embeddings=rope["original_max_position_embeddings"],
    )


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
        ValueError: if they differ, with one line for each field
    """
    differences = [
        f"{field}: the model builder has {value!r}, config.json has {getattr(found, field)!r}"
        for field, value in vars(ARCHITECTURES[name]).items()
        if getattr(found, field) != value
    ]
    if differences:
        raise ValueError(f"{base_dir} does not hold {name}:\n  " + "\n  ".join(differences))
