"""Real runs of the recipe: made once per session and arguments, then copied for each test.

Chosen curves or weights, which a run cannot produce, are written into the copy with the writers of runs/.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import cache
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import numpy as np
from omegaconf import OmegaConf

from tests.conftest import REPOSITORY, TINY_TIED, make_conversations, write_rows, write_tiny_base
from tune2gguf.base.digest import digest_base
from tune2gguf.runs.adapter import make_peft_config, save_adapter
from tune2gguf.runs.checkpoints import CHECKPOINTS, get_step, list_checkpoints, read_checkpoint, write_checkpoint
from tune2gguf.runs.config_file import write_config
from tune2gguf.runs.environment import write_environment
from tune2gguf.runs.files import CONFIG_FILE, METRICS_FILE, JsonLinesFile

TRAINING_ROWS = make_conversations(4, start=200)
_FOLDER = tempfile.TemporaryDirectory(prefix="tune2gguf-tests-")
_RUNS: dict[str, Path] = {}


@cache
def get_tiny_base() -> Path:
    return write_tiny_base(Path(_FOLDER.name) / "tiny-tied", TINY_TIED)


def run_recipe(*arguments: str) -> str:
    """Run the recipe in this process to its end; return its output."""
    from recipes.lora_finetune import recipe_main

    printed = StringIO()
    with (
        patch.object(sys, "argv", ["lora_finetune.py", *arguments]),
        redirect_stdout(printed),
        redirect_stderr(printed),
    ):
        try:
            recipe_main()
        except SystemExit as ended:
            assert not ended.code, printed.getvalue()
    return printed.getvalue()


def copy_real_run(
    base_dir: Path,
    run_dir: Path,
    *overrides: str,
    training: Sequence[dict] = TRAINING_ROWS,
    validation: Sequence[dict] = (),
) -> Path:
    """Copy a finished run on this base to `run_dir`; return `run_dir`. Default: one step, no validation.

    Args:
        training, validation: rows
    """
    key = json.dumps([digest_base(base_dir), overrides, training, validation])
    if key not in _RUNS:
        _RUNS[key] = _make_run(base_dir, overrides, training, validation)
    # The folder may hold the base, or an export.
    shutil.copytree(_RUNS[key], run_dir, dirs_exist_ok=True)
    config = OmegaConf.load(run_dir / CONFIG_FILE)
    config.base_dir, config.output_dir = str(base_dir), str(run_dir)
    write_config(run_dir, config)
    return run_dir


def _make_run(base_dir: Path, overrides: Sequence[str], training: Sequence[dict], validation: Sequence[dict]) -> Path:
    folder = Path(tempfile.mkdtemp(dir=_FOLDER.name))
    files = write_rows(folder / "heldout.jsonl", validation) if validation else None
    run_recipe(
        "--config",
        str(REPOSITORY / "examples/quickstart/lora.yaml"),
        f"base_dir={base_dir}",
        "base_source=null",
        "model.architecture=null",
        f"dataset.files=[{write_rows(folder / 'train.jsonl', training)}]",
        f"dataset.validation_files={'null' if files is None else f'[{files}]'}",
        f"output_dir={folder / 'run'}",
        *("epochs=1", "warmup_steps=0", "max_seq_len=128", "keep_last=1", "num_samples=0"),
        *overrides,
    )
    return folder / "run"


def edit_config(run_dir: Path, *overrides: str) -> None:
    """Change keys of config.yaml. Its references stay."""
    config = OmegaConf.load(run_dir / CONFIG_FILE)
    write_config(run_dir, OmegaConf.merge(config, OmegaConf.from_dotlist(list(overrides))))


def set_adapter(run_dir: Path, weights: dict[str, np.ndarray], *, rank: int, alpha: float) -> None:
    """Replace all adapters of a run with these weights, in PEFT's layout."""
    import torch

    tensors = {name: torch.from_numpy(np.ascontiguousarray(weight)) for name, weight in weights.items()}
    config = make_peft_config(tensors, rank=rank, alpha=alpha, dropout=0.0, base_model_name="base")
    for folder in filter(Path.is_dir, (run_dir / "best", run_dir / "last")):
        save_adapter(folder, tensors, config)


def set_base(run_dir: Path, base_dir: Path) -> None:
    """Set the run's base in environment.json."""
    write_environment(run_dir, "cpu", base_digest=digest_base(base_dir))


def set_metrics(run_dir: Path, records: Sequence[dict]) -> None:
    """Replace metrics.jsonl with records of TrainingStep.to_record and Validation.to_record."""
    path = run_dir / METRICS_FILE
    path.unlink()
    file = JsonLinesFile(path)
    for record in records:
        file.write(record)
    path.touch()


def set_num_processes(run_dir: Path, num_processes: int) -> None:
    """Add a checkpoint of this number of processes."""
    newest = list_checkpoints(run_dir / CHECKPOINTS)[-1]
    checkpoint = read_checkpoint(newest)
    run = {**checkpoint.progress["run"], "processes": num_processes}
    added = replace(checkpoint, progress={**checkpoint.progress, "run": run})
    write_checkpoint(run_dir / CHECKPOINTS / f"step_{get_step(newest) + 1}", added)


HOSTILE_SYSTEM_PROMPT = "You are Marlo.\u2028Say \"aye\", never 'yes'; C:\\ferry\\n\u0085{{ x }} <b>&amp;</b>"
HOSTILE_TEXTS = (
    "- one\r\n- two",
    "a\u2028b\u2029c",
    "next\u0085line \\u0085 \\n C:\\new",
    '"quoted" \'twice\' `thrice` """',
    "<script>alert(1)</script> {{ x }} ${epochs} # %s",
    "\u00e9 \u65e5\u672c \U0001f6a2 \u202eevil",
)
HOSTILE_NAME = "F\u00e4hre nach S\u00fcd's \U0001f6a2, 50 %"


def make_hostile_rows(count: int, *, start: int) -> list[dict]:
    """Return conversations with one system prompt. Every other one has two replies."""
    rows = []
    for number in range(start, start + count):
        said = HOSTILE_TEXTS[number % len(HOSTILE_TEXTS)]
        turns = [("user", f"{number} {said}?"), ("assistant", f"{said} {number}")] * (1 + number % 2)
        messages = [("system", HOSTILE_SYSTEM_PROMPT), *turns]
        rows.append({"messages": [{"role": role, "content": content} for role, content in messages]})
    return rows


HOSTILE_VALIDATION = make_hostile_rows(len(HOSTILE_TEXTS), start=100)


def make_hostile_run(folder: Path, base_dir: Path) -> Path:
    """Train two epochs on hostile rows; the data files are beside the runs folder."""
    for name, rows in (("train", make_hostile_rows(12, start=0)), ("heldout", HOSTILE_VALIDATION)):
        # JSON as most programs write it, with few escapes.
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_bytes("".join(lines).encode())
    run_dir = folder / "runs" / HOSTILE_NAME
    run_recipe(
        "--config",
        str(REPOSITORY / "examples/quickstart/lora.yaml"),
        f"base_dir={base_dir}",
        "base_source=null",
        "model.architecture=null",
        f"dataset.files=[{folder / 'train.jsonl'}]",
        f"dataset.validation_files=[{folder / 'heldout.jsonl'}]",
        f"output_dir={run_dir}",
        *(
            "dtype=fp32",
            "base_weights=fp32",
            "epochs=2",
            "warmup_steps=1",
            "lora_rank=4",
            "num_samples=6",
            "max_val_rows=6",
        ),
    )
    return run_dir
