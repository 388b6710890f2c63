"""Train a small Llama from scratch, for runs on a second base: python benchmarks/train_base.py models/scratch

It has 50 million weights and SmolLM2's tokenizer. It learns the docstrings of Python's standard library and of the
installed packages: as text, and as ChatML conversations that ask what a function does. Its prose is poor, but its
adapters learn and overfit like any model's. The folder is for use on this machine; do not publish it.
"""

import argparse
import ast
import json
import random
import shutil
import sys
import sysconfig
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from recipe_runs import REPOSITORY, SMOLLM2

from tune2gguf.tokenizer.conversation import Message
from tune2gguf.tokenizer.tokenizer import load_tokenizer

SEQ, ROWS_PER_STEP, PEAK_RATE, WARMUP_STEPS = 512, 32, 6e-4, 100
MAX_DOCSTRING = 2000  # characters
FILES_AT_A_TIME = 2000
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def list_sources() -> list[Path]:
    """Return the Python files of the standard library and all import folders, without tests."""
    folders = {Path(folder).resolve() for folder in (sysconfig.get_path("stdlib"), *sys.path)}
    outside = [folder for folder in folders if folder.is_dir() and not folder.is_relative_to(REPOSITORY)]
    paths = {path for folder in outside for path in folder.rglob("*.py")}
    return sorted(path for path in paths if not {"test", "tests", "testing"} & set(path.parts))


def read_docstrings(path: Path) -> list[tuple[str, str]]:
    """Return name and docstring of the module, classes and functions of a file."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError, RecursionError):
        return []
    nodes = (node for node in ast.walk(tree) if isinstance(node, DOCUMENTED))
    pairs = [(getattr(node, "name", path.stem), ast.get_docstring(node) or "") for node in nodes]
    return [(name, text[:MAX_DOCSTRING]) for name, text in pairs if len(text) > 40]


def list_docstrings(num_characters: int) -> list[tuple[str, str]]:
    """Return (name, docstring) pairs in a fixed random order without duplicates, up to this many characters."""
    paths, found = list_sources(), {}
    random.Random(0).shuffle(paths)
    with ProcessPoolExecutor() as pool:
        for begin in range(0, len(paths), FILES_AT_A_TIME):
            for pairs in pool.map(read_docstrings, paths[begin : begin + FILES_AT_A_TIME], chunksize=20):
                found |= {text: name for name, text in pairs if text not in found}
            if sum(map(len, found)) > num_characters:
                break
    return [(name, text) for text, name in found.items()]


def make_tokens(num_tokens: int) -> np.ndarray:
    """Return at most this many tokens, in a fixed random order."""
    tokenizer = load_tokenizer(SMOLLM2, chat_template="chatml")
    pairs = list_docstrings(6 * num_tokens)
    ids: list[int] = []
    for number, (name, text) in enumerate(pairs):
        if number % 2:
            ids += tokenizer.encode_document(text)[0]
        else:
            messages = [Message("user", f"What does {name} do?"), Message("assistant", text)]
            ids += tokenizer.encode_conversation(messages)[0]
        if len(ids) > num_tokens:
            break
    return np.array(ids[:num_tokens])


def train(model: torch.nn.Module, tokens: np.ndarray, *, steps: int, device: str) -> float:
    """Train on random pieces; return the mean loss of the last tenth of the steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_RATE, total_steps=steps, pct_start=min(0.3, WARMUP_STEPS / steps)
    )
    generator, losses, started = np.random.default_rng(0), [], time.perf_counter()
    for step in range(steps):
        starts = generator.integers(0, len(tokens) - SEQ, ROWS_PER_STEP)
        batch = torch.from_numpy(np.stack([tokens[start : start + SEQ] for start in starts])).to(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if step % max(1, steps // 10) == 0:
            print(f"step {step}: loss {float(losses[-1]):.3f}, {time.perf_counter() - started:.0f} s", flush=True)
    return float(torch.stack(losses[-max(1, steps // 10) :]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    arguments = parser.parse_args()
    if arguments.out.exists():
        sys.exit(f"{arguments.out} exists already; remove it or choose another folder")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokens = make_tokens(arguments.steps * ROWS_PER_STEP * SEQ)
    print(f"{len(tokens)} tokens of docstrings")
    like = json.loads((SMOLLM2 / "config.json").read_text(encoding="utf-8"))
    config = LlamaConfig(
        **{key: like[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "rms_norm_eps")},
        hidden_size=arguments.width,
        intermediate_size=arguments.width * 3,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.width // 64,
        num_key_value_heads=arguments.width // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(arguments.device).train()
    loss = train(model, tokens, steps=arguments.steps, device=arguments.device)
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SMOLLM2 / name, arguments.out / name)
    print(f"wrote {arguments.out}: loss {loss:.3f} at the end")


if __name__ == "__main__":
    main()
