"""Templates of an export: the GGUF's and TEMPLATE both have tools if the rows or the base have them."""

import json
import shutil

import pytest
from gguf import GGUFReader

from tests.conftest import make_conversations
from tests.parity.gguf_models import SMALL_MODELS, write_run, write_small_run
from tests.tool_conversations import ASK, DEPART, PLAIN, calling
from tune2gguf.base.checkpoint import open_base
from tune2gguf.export.chat_template import takes_tools
from tune2gguf.export.modelfile import make_modelfile
from tune2gguf.export.pipeline import Export, export_run
from tune2gguf.tokenizer.templates import CHAT_TEMPLATES, CHATML, LLAMA3

ROW = {"tools": [PLAIN], "messages": [ASK, calling(DEPART)]}


def read_templates(export: Export) -> tuple[str, str]:
    """Return the GGUF's template, and the Modelfile."""
    field = GGUFReader(export.models[0].gguf_path).fields["tokenizer.chat_template"]
    return field.contents(), export.models[0].modelfile_path.read_text()


@pytest.mark.parametrize("has_tools", [True, False])
def test_rows_with_tools_make_the_template_take_them(tiny_base, tmp_path, has_tools):
    rows = [*make_conversations(4), *([ROW] if has_tools else [])]
    base_dir = shutil.copytree(tiny_base, tmp_path / "base")
    config = json.loads((base_dir / "config.json").read_text()) | {"max_position_embeddings": 4096}
    (base_dir / "config.json").write_text(json.dumps(config))
    run_dir = write_run(base_dir, tmp_path / "Ferry", "max_seq_len=2000", chat_template="chatml", training=rows)
    export = export_run(run_dir, show=False)
    expected = CHATML.with_tools() if has_tools else CHATML
    jinja, modelfile = read_templates(export)
    assert jinja == expected.jinja_template
    assert f'TEMPLATE """{expected.ollama_template}"""' in modelfile
    assert ("tools" in jinja, ".Tools" in modelfile) == (has_tools, has_tools)
    assert ("chatml with tools" in export.model_card_path.read_text()) == has_tools


@pytest.mark.parametrize(
    ("name", "content", "takes"),
    [
        ("tokenizer_config.json", {"chat_template": "{% if tools %}{% endif %}"}, True),
        ("tokenizer_config.json", {"chat_template": "{{ messages }}"}, False),
        (
            "tokenizer_config.json",
            {"chat_template": [{"name": "default", "template": ""}, {"template": "tools"}]},
            True,
        ),
        ("chat_template.jinja", "{% if tools %}{% endif %}", True),
        ("tokenizer_config.json", {}, False),
    ],
)
def test_a_base_whose_own_template_takes_tools_keeps_them(tiny_untied_base, tmp_path, name, content, takes):
    base_dir = shutil.copytree(tiny_untied_base, tmp_path / "base")
    (base_dir / name).write_text(content if isinstance(content, str) else json.dumps(content))
    run_dir = write_run(base_dir, tmp_path / "Ferry", chat_template="chatml", training=make_conversations(4))
    assert export_run(run_dir, show=False).chat_template.takes_tools == takes


def test_without_a_template_a_llama_of_3_1_or_later_is_known_by_its_rope_scaling(tmp_path):
    base_dir = write_small_run(SMALL_MODELS[0], tmp_path).parent / "base"
    assert not takes_tools(open_base(base_dir), LLAMA3), "its own template has none"
    (base_dir / "tokenizer_config.json").unlink()
    assert takes_tools(open_base(base_dir), LLAMA3)
    config = json.loads((base_dir / "config.json").read_text())
    (base_dir / "config.json").write_text(json.dumps({**config, "rope_scaling": None}))
    assert not takes_tools(open_base(base_dir), LLAMA3), "3.0"


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_modelfile_holds_the_template_with_tools_and_its_stops(name):
    """TEMPLATE ends at three quotes before a line break, and omits characters that do not print."""
    chat_template = CHAT_TEMPLATES[name].with_tools()
    text = make_modelfile("x.gguf", chat_template=chat_template, context_length=64)
    assert '"""' not in chat_template.ollama_template
    assert all(one.isprintable() or one in "\t\n" for one in chat_template.ollama_template)
    assert 'eq .Role "tool"' in text and "if .ToolCalls" in text, "by these Ollama knows that calls and results fit"
    stops = [line.removeprefix("PARAMETER stop ") for line in text.splitlines() if line.startswith("PARAMETER stop")]
    assert ('"<|eom_id|>"' in stops) == (name != "chatml")
    assert f'"{chat_template.end_of_turn}"' in stops


def find_tag(template: str) -> str:
    """Return the prefix by which Ollama finds a call: the text after `if .ToolCalls`, up to a brace."""
    behind = template.split("{{ if .ToolCalls }}", 1)[1]
    while behind.startswith("{{ range") or behind.startswith("{{ with"):
        behind = behind.split("}}", 1)[1]
    assert not behind.startswith("{{"), "anything else hides the text"
    return behind.split("{{", 1)[0].split("{", 1)[0].strip() or "{"


def test_ollama_finds_where_a_call_begins():
    assert find_tag(CHATML.ollama_with_tools) == "<tool_call>"
    assert find_tag(LLAMA3.ollama_with_tools) == "{"
