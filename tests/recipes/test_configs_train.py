"""Every shipped config trains unchanged, except for the paths of base and data, on a CPU."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import REPOSITORY, TINY_TIED, make_conversations, write_rows, write_tiny_tokenizer
from tests.recipes.test_training import read_adapter, read_records, run_recipe
from tune2gguf.base.random_base import write_random_base

CONFIGS = sorted((REPOSITORY / "configs").rglob("*.yaml"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    wide = replace(TINY_TIED, embed_dim=64)  # rows of whole 4-bit blocks
    bases = {kind: write_random_base(wide, folder / kind, kind=kind) for kind in ("bf16", "bnb-4bit")}
    for base in bases.values():
        write_tiny_tokenizer(base)
    return bases


def make_arguments(config: Path, base: Path, tmp_path: Path) -> list[str]:
    rows = write_rows(tmp_path / "train.jsonl", make_conversations(40))
    return [
        *("--config", str(config), f"base_dir={base}", "base_source=null", "model.architecture=null"),
        *("chat_template=chatml", "device=cpu", f"dataset.files=[{rows}]", f"output_dir={tmp_path / 'run'}"),
        *("max_seq_len=256", "warmup_steps=1", "epochs=1", "learning_rate=1.0e-3"),
    ]


@pytest.mark.parametrize("kind", ["bf16", "bnb-4bit"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_config_trains_on_either_kind_of_base(config, kind, bases, tmp_path, monkeypatch):
    run_recipe(make_arguments(config, bases[kind], tmp_path), monkeypatch)
    losses = [record["loss"] for record in read_records(tmp_path / "run", "loss")]
    assert len(losses) >= 4 and np.isfinite(losses).all()
    assert all(np.isfinite(weight).all() for weight in read_adapter(tmp_path / "run").values())
    assert any(weight.any() for name, weight in read_adapter(tmp_path / "run").items() if "lora_B" in name)


def test_estimate_is_printed_before_the_run_and_a_lack_of_memory_is_warned_of(bases, tmp_path, monkeypatch, capsys):
    arguments = make_arguments(REPOSITORY / "configs/llama3_2_1b/lora.yaml", bases["bf16"], tmp_path)
    run_recipe(arguments, monkeypatch)
    printed = capsys.readouterr()
    assert re.search(r"memory: about 0\.4\d GB \(base 0\.00, adapter 0\.00, .* GB are free on cpu", printed.out)
    assert "out of memory" not in printed.err
    # More than any machine can address.
    with pytest.raises(SystemExit) as stopped:
        run_recipe([*arguments, f"output_dir={tmp_path / 'again'}", "lora_rank=10000000000000"], monkeypatch)
    printed = capsys.readouterr().err
    assert stopped.value.code == 1 and "Traceback" not in printed
    assert "warning: this run will probably run out of memory: it needs about " in printed
    assert "error: out of memory on cpu: " in printed and "No setting makes it fit" in printed
