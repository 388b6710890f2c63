"""Bases small enough to train in a second: true Llama architecture, random weights, a new tokenizer."""

import importlib.util
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from tune2gguf.model.architectures import Architecture, RopeScaling, make_hf_config
from tune2gguf.tokenizer.templates import CHATML

# Without a GPU Triton's kernels run in its interpreter; it must be set before Triton is imported.
INTERPRETS_TRITON = importlib.util.find_spec("triton") is not None and not torch.cuda.is_available()
if INTERPRETS_TRITON:
    os.environ["TRITON_INTERPRET"] = "1"

# torch's compiler imports setuptools, which refuses where another test has imported Python's own distutils before.
if importlib.util.find_spec("setuptools") is not None:
    importlib.import_module("setuptools")

# In the background of a script, Python ignores Ctrl-C, and so do the child processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The models here are tiny: a second thread costs more than it gains.
torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parents[1]

TINY_TIED = Architecture(
    vocab_size=384,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    embed_dim=32,
    intermediate_dim=64,
    head_dim=8,
    max_position_embeddings=512,
    tied=True,
    rope_scaling=RopeScaling(factor=32.0, original_max_position_embeddings=64),
)
TINY_UNTIED = Architecture(**{**vars(TINY_TIED), "tied": False, "rope_scaling": None, "rope_base": 10_000.0})

SENTENCES = [
    "The ferry leaves Reed Quay at seven and at nine.",
    "Dogs are welcome on deck, and bikes ride for free.",
    "A single fare is three coins; children pay one.",
    "Ask Marlo about the fog, the tides and the tea.",
]


@pytest.fixture(scope="session")
def peft():
    """Return peft. Skip if it refuses an old torchao in the environment."""
    peft = pytest.importorskip("peft")
    try:
        peft.import_utils.is_torchao_available()
    except ImportError as error:
        pytest.skip(str(error))
    return peft


def write_tiny_tokenizer(base_dir: Path) -> None:
    """Train a byte-level BPE of 384 tokens on a few sentences, with the ChatML tokens last."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, show_progress=False)
    )
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    filler = [f"<|unused_{number}|>" for number in range(TINY_TIED.vocab_size - tokenizer.get_vocab_size() - 3)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in filler + specials])
    assert tokenizer.get_vocab_size() == TINY_TIED.vocab_size
    tokenizer.save(str(base_dir / "tokenizer.json"))
    tokenizer_config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    (base_dir / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))


def write_tiny_base(
    base_dir: Path, architecture: Architecture, *, seed: int = 0, dtype=torch.float32, std: float = 0.2
) -> Path:
    """Write a base folder in the Hugging Face layout with random weights, large enough for logits to differ."""
    from safetensors.torch import save_file

    base_dir.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    a = architecture

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(dtype)

    tensors = {"model.embed_tokens.weight": draw(a.vocab_size, a.embed_dim)}
    for layer in range(a.num_layers):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "self_attn.q_proj.weight": draw(a.num_heads * a.head_dim, a.embed_dim),
            prefix + "self_attn.k_proj.weight": draw(a.num_kv_heads * a.head_dim, a.embed_dim),
            prefix + "self_attn.v_proj.weight": draw(a.num_kv_heads * a.head_dim, a.embed_dim),
            prefix + "self_attn.o_proj.weight": draw(a.embed_dim, a.num_heads * a.head_dim),
            prefix + "mlp.gate_proj.weight": draw(a.intermediate_dim, a.embed_dim),
            prefix + "mlp.up_proj.weight": draw(a.intermediate_dim, a.embed_dim),
            prefix + "mlp.down_proj.weight": draw(a.embed_dim, a.intermediate_dim),
            prefix + "input_layernorm.weight": 1 + draw(a.embed_dim),
            prefix + "post_attention_layernorm.weight": 1 + draw(a.embed_dim),
        }
    tensors["model.norm.weight"] = 1 + draw(a.embed_dim)
    if not a.tied:
        tensors["lm_head.weight"] = draw(a.vocab_size, a.embed_dim)
    save_file(tensors, base_dir / "model.safetensors", metadata={"format": "pt"})
    (base_dir / "config.json").write_text(json.dumps(make_hf_config(architecture)))
    write_tiny_tokenizer(base_dir)
    return base_dir


@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    """Python waits for its threads at the end: one that hangs would block the whole suite."""
    yield
    left = multiprocessing.active_children()
    for process in left:
        process.kill()
        process.join()
    assert not left


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("bases") / "tiny-tied", TINY_TIED)


@pytest.fixture(scope="session")
def tiny_untied_base(tmp_path_factory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("bases") / "tiny-untied", TINY_UNTIED)


@pytest.fixture(scope="session")
def wide_base(tmp_path_factory) -> Path:
    """Return a base whose 4-bit weights have more than one block of scales."""
    wide = Architecture(**{**vars(TINY_TIED), "embed_dim": 256, "intermediate_dim": 256, "head_dim": 64})
    return write_tiny_base(tmp_path_factory.mktemp("bases") / "wide", wide)


def make_conversations(count: int, *, start: int = 0) -> list[dict]:
    """Return distinct conversations of unequal length."""
    rows = []
    for number in range(start, start + count):
        reply = " ".join(SENTENCES[: 1 + number % len(SENTENCES)])
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": f"Question {number}: what should I know?"},
                    {"role": "assistant", "content": f"Answer {number}. {reply}"},
                ]
            }
        )
    return rows


def make_unseen_conversations() -> list[dict]:
    """Return conversations of letters that others never show: as validation rows, they lose with every step."""
    contents = [(f"Name {number} letters.", "äöüß " * number) for number in range(10, 16)]
    return [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]}
        for prompt, reply in contents
    ]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run_arguments(tmp_path, tiny_base) -> list[str]:
    return make_run_arguments(tmp_path, tiny_base)


def make_run_arguments(folder: Path, base_dir: Path) -> list[str]:
    """Return arguments of a tiny, exact (float32, no dropout) run on the quickstart's config: 20 + 5 rows."""
    return [
        "--config",
        str(REPOSITORY / "examples/quickstart/lora.yaml"),
        f"base_dir={base_dir}",
        "base_source=null",
        "model.architecture=null",
        f"dataset.files=[{write_rows(folder / 'train.jsonl', make_conversations(20))}]",
        f"dataset.validation_files=[{write_rows(folder / 'heldout.jsonl', make_conversations(5, start=100))}]",
        f"output_dir={folder / 'runs' / 'tiny'}",
        "dtype=fp32",
        "base_weights=fp32",
        "epochs=1",
        "warmup_steps=1",
        "lora_dropout=0.0",
        "lora_rank=4",
        "lora_alpha=4",
        "max_val_rows=5",
        "num_samples=0",
    ]


@pytest.fixture
def fake_ollama(tmp_path, monkeypatch) -> Iterator[Path]:
    """An `ollama` program on PATH and a server with Ollama's API. Both record their requests."""
    folder = tmp_path / "bin"
    folder.mkdir()
    log = tmp_path / "calls.jsonl"
    program = folder / "ollama"
    program.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"open({str(log)!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
        "assert 'FROM ./' in open(sys.argv[4]).read()\n"
        "sys.exit(int(os.environ.get('OLLAMA_EXIT', '0')))\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_OllamaHandler, log))
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{server.server_port}")
    with server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield log
        server.shutdown()


class _OllamaHandler(BaseHTTPRequestHandler):
    """Ollama's API: it has a model `taken`, and every model answers `Ahoy!`."""

    def __init__(self, log: Path, *arguments: Any) -> None:
        self.log = log
        super().__init__(*arguments)

    def do_GET(self) -> None:
        self._answer(200, {"version": "0.32.15"})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/api/show":
            self._answer(*((200, {}) if request["model"] == "taken" else (404, {"error": "model not found"})))
        else:
            with self.log.open("a") as file:
                file.write(json.dumps([self.path, request]) + "\n")
            self._answer(200, {"message": {"role": "assistant", "content": "Ahoy!"}})

    def _answer(self, status: int, content: dict) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *arguments: Any) -> None:
        """Log nothing."""


@pytest.fixture(scope="session")
def hostile_run(tmp_path_factory, tiny_base) -> Path:
    """Return a run with rows and a name that are hostile to files and pages. Tests change a copy of it."""
    from tests.runs import make_hostile_run

    return make_hostile_run(tmp_path_factory.mktemp("hostile"), tiny_base)


assert CHATML.end_of_turn == "<|im_end|>", "write_tiny_tokenizer spells ChatML's tokens"
