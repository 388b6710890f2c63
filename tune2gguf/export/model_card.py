"""README.md of an export: what the model is, what it was made of, how well it does, and how to run it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from tune2gguf.export.licence import Licence
from tune2gguf.guide import GUIDE_PARAMETERS
from tune2gguf.runs.curves import METRICS_FILE, Curves, read_curves
from tune2gguf.runs.read import BEST, FinishedRun


def make_model_card(
    run: FinishedRun, *, licence: Licence, files: Sequence[tuple[Path, str]], merge: str | None = None
) -> str:
    """Return the card as Markdown with front matter.

    Args:
        merge: a sentence on which base the adapter was merged into, where there were two
        files: each GGUF of a whole model in the export folder, with the Modelfile that serves it
    """
    guide_keys = [parameter.key for parameter in GUIDE_PARAMETERS]
    parts = [
        _make_front_matter(run, licence),
        f"# {run.name}\n\nA fine-tune of {run.base_name}, made with LoRA by tune2gguf: "
        f"the run's {run.adapter_dir.name} adapter." + ("" if merge is None else f"\n\nThe adapter was {merge}."),
        f"## Licence\n\n{licence.duties}",
        _describe_run(run, files),
        _describe_quality(run),
        _describe_data(run.run_dir / "data.json"),
        "## Parameters\n\n| parameter | value |\n|---|---|\n"
        + "\n".join(f"| {key} | {run.config[key]} |" for key in guide_keys if key in run.config),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _make_front_matter(run: FinishedRun, licence: Licence) -> str:
    # JSON strings are YAML strings, whatever the name holds.
    lines = [f"base_model: {json.dumps(run.base_name)}"]
    lines += [] if licence.identifier is None else [f"license: {licence.identifier}"]
    return "\n".join(["---", *lines, "tags: [lora, gguf, torchtune]", "---"])


def _describe_run(run: FinishedRun, files: Sequence[tuple[Path, str]]) -> str:
    rows = [f"| {path.name} | {path.stat().st_size / 1e6:.0f} MB | {modelfile} |" for path, modelfile in files]
    name = re.sub(r"[^a-z0-9._-]+", "-", run.name.lower())
    serve = f"ollama create {name} -f {files[0][1]} && ollama run {name}"
    return (
        "## Run it\n\n| file | size | Modelfile |\n|---|---|---|\n" + "\n".join(rows) + f"\n\n```\n{serve}\n```\n\n"
        f"Chat template: {run.chat_template.name}, context as trained: {run.max_seq_len} tokens. "
        "The file holds tokenizer and chat template; llama.cpp needs nothing else."
    )


def _describe_quality(run: FinishedRun) -> str:
    curves = read_curves(run.run_dir) if (run.run_dir / METRICS_FILE).is_file() else Curves()
    if curves.base is None:
        return ""
    exported = (curves.best if run.adapter_dir.name == BEST else curves.final) or curves.base
    return (
        "## Validation loss\n\n"
        f"{curves.base.loss:.3f} before training, {exported.loss:.3f} at step {exported.step} "
        f"({exported.rows} rows, nats per supervised token)."
    )


def _describe_data(path: Path) -> str:
    if not path.is_file():
        return ""
    ledger = json.loads(path.read_text(encoding="utf-8"))
    counts = ", ".join(f"{name} {ledger[name]}" for name in ("trained", "validated", "truncated", "dropped"))
    files = "\n".join(f"- {file['file']}: {file['read']} rows" for file in ledger["files"])
    return f"## Data\n\nRows read {ledger['read']}: {counts}.\n\n{files}"
