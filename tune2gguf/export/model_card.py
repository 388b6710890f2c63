"""The model card, README.md of an export: base, licence, files, commands, validation loss, data, parameters."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from tune2gguf.commands import format_command
from tune2gguf.data.ledger import RowLedger
from tune2gguf.export.licence import Licence
from tune2gguf.guide import GUIDE_PARAMETERS
from tune2gguf.runs.curves import Curves
from tune2gguf.runs.run import BEST, Run


def make_model_card(
    run: Run,
    *,
    licence: Licence,
    files: Sequence[tuple[Path, str]],
    adapter_files: tuple[Path, Path] | None,
    temperature: float,
    takes_tools: bool,
    merge: str | None = None,
) -> str:
    """Return the card as Markdown with front matter.

    Args:
        merge: a sentence on the base that the adapter was merged into, if there were two
        files: each GGUF of a whole model in the export folder, with the Modelfile that serves it
        adapter_files: the base GGUF and the adapter GGUF of Modelfile-adapter, if any
        temperature: temperature in the Modelfiles
        takes_tools: whether the chat template takes tools
    """
    keys = [parameter.key for parameter in GUIDE_PARAMETERS]
    unknown = f"the model in the folder {run.base_name}, of unknown origin"
    base = unknown if run.base_source is None else run.base_name
    parts = [
        _make_front_matter(run, licence),
        f"# {run.name}\n\nA fine-tune of {base}, made with LoRA by tune2gguf: "
        f"the run's {run.adapter_dir.name} adapter." + _describe_merge(run, merge),
        f"## Licence\n\n{licence.duties}",
        _describe_run(run, files, adapter_files=adapter_files, temperature=temperature, takes_tools=takes_tools),
        _describe_quality(run.curves, adapter=run.adapter_dir.name),
        _describe_data(run.data),
        "## Parameters\n\n| parameter | value |\n|---|---|\n"
        + "\n".join(f"| {key} | {run.config[key]} |" for key in keys if key in run.config),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _describe_merge(run: Run, merge: str | None) -> str:
    merged = "" if merge is None else f"\n\nThe adapter was {merge}."
    if run.gguf_type is None:
        return merged
    return f"\n\nThe adapter was trained over the base in {run.gguf_type} and is served beside that file.{merged}"


def _make_front_matter(run: Run, licence: Licence) -> str:
    # JSON strings are YAML strings, whatever the name holds.
    lines = [] if run.base_source is None else [f"base_model: {json.dumps(run.base_name)}"]
    lines += [] if licence.identifier is None else [f"license: {licence.identifier}"]
    return "\n".join(["---", *lines, "tags: [lora, gguf, torchtune]", "---"])


def _describe_run(
    run: Run,
    files: Sequence[tuple[Path, str]],
    *,
    adapter_files: tuple[Path, Path] | None,
    temperature: float,
    takes_tools: bool,
) -> str:
    rows = [f"| {path.name} | {path.stat().st_size / 1e6:.0f} MB | {modelfile} |" for path, modelfile in files]
    rows += [
        f"| {path.name} | {path.stat().st_size / 1e6:.0f} MB | Modelfile-adapter, with the other |"
        for path in adapter_files or ()
    ]
    # Ollama's names begin with a letter or a digit.
    name = re.sub(r"[^a-z0-9._-]+", "-", run.name.lower()).strip("-._") or "tuned"
    modelfile = files[0][1] if files and run.gguf_type is None else "Modelfile-adapter"
    create = format_command("ollama", "create", name, "-f", modelfile)
    serve = f"{create} && {format_command('ollama', 'run', name)}"
    tools = " with tools" if takes_tools else ""
    return (
        "## Run it\n\n| file | size | Modelfile |\n|---|---|---|\n" + "\n".join(rows) + f"\n\n```\n{serve}\n```\n\n"
        f"Chat template: {run.chat_template.name}{tools}, context as trained: {run.max_seq_len} tokens. "
        "The file holds tokenizer and chat template; llama.cpp needs nothing else.\n\n"
        f"The Modelfile sets temperature {temperature:g}: 0 gives the likeliest answer, which the proof has checked, "
        "1 draws from the distribution as trained. Other programs have a default of their own; set it there."
    )


def _describe_quality(curves: Curves, *, adapter: str) -> str:
    exported = curves.best if adapter == BEST else curves.final
    if exported is None:
        return ""
    before = "" if curves.base is None else f"{curves.base.loss:.3f} before training, "
    return (
        f"## Validation loss\n\n{before}{exported.loss:.3f} at step {exported.step} "
        f"({exported.rows} rows, nats per supervised token)."
    )


def _describe_data(data: RowLedger) -> str:
    counts = ", ".join(f"{name} {data[name]}" for name in ("trained", "validated", "truncated", "dropped"))
    files = "\n".join(f"- {file['file']}: {file['read']} rows" for file in data["files"])
    return f"## Data\n\nRows read {data['read']}: {counts}.\n\n{files}"
