"""The chat template of an export; it takes tools if the rows or the base do."""

from __future__ import annotations

from pathlib import Path

from tune2gguf.base.checkpoint import BaseCheckpoint
from tune2gguf.files.json_files import read_json
from tune2gguf.runs.run import Run
from tune2gguf.tokenizer.templates import ChatTemplate


def choose_chat_template(run: Run, base: BaseCheckpoint) -> ChatTemplate:
    """Return the run's chat template, with tools if the run was trained on tools or the base takes them."""
    had_tools = run.data.get("rows_with_tools", 0) > 0  # earlier versions did not record it
    return run.chat_template.with_tools() if had_tools or takes_tools(base, run.chat_template) else run.chat_template


def takes_tools(base: BaseCheckpoint, chat_template: ChatTemplate) -> bool:
    """Return whether a base's own chat template mentions tools; without one, whether the base is Llama 3.1 or later."""
    templates = _read_templates(base.base_dir)
    if templates:
        return any("tools" in template for template in templates)
    return chat_template.name.startswith("llama3") and base.architecture.rope_scaling is not None


def _read_templates(base_dir: Path) -> list[str]:
    found = [path.read_text(encoding="utf-8", errors="replace") for path in base_dir.glob("chat_template.jin*")]
    config_path = base_dir / "tokenizer_config.json"
    if config_path.is_file():
        template = read_json(config_path, lambda content: content.get("chat_template"))
        # A list holds several named templates.
        named = template if isinstance(template, list) else [{"template": template}]
        found += [one["template"] for one in named if isinstance(one.get("template"), str)]
    return found
