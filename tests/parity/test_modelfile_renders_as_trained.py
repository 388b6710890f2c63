"""The Modelfile's TEMPLATE, rendered by Go's text/template as in Ollama, equals the trained format byte for byte."""

import pytest

from tests.conversations import make_prompts
from tests.parity.go_renderer import render_messages
from tests.unit.test_export_metadata import NOT_HELD, parse_modelfile
from tune2gguf.export.modelfile import make_modelfile
from tune2gguf.tokenizer.conversation import Message
from tune2gguf.tokenizer.templates import CHAT_TEMPLATES, LLAMA3, ChatTemplate


def read_template(modelfile: str) -> str:
    """Return TEMPLATE like Ollama's parser: all between the triple quotes."""
    return modelfile.split('TEMPLATE """', 1)[1].split('"""', 1)[0]


def render_trained(chat_template: ChatTemplate, messages: list[Message]) -> str:
    """Render a conversation in a defined format, without BOS, which the runtime adds.

    A last assistant message is a prefill.
    """
    prefill = [turn.content for turn in messages[-1:] if turn.role == "assistant"]
    messages = messages[: len(messages) - len(prefill)]
    if chat_template.system_prefix and messages[0].role != "system":
        messages = [Message("system", ""), *messages]
    rendered = "".join(
        chat_template.role_start
        + turn.role
        + chat_template.role_end
        + (chat_template.system_prefix if turn.role == "system" else "")
        + turn.content
        + chat_template.end_of_turn
        + chat_template.turn_separator
        for turn in messages
    )
    return rendered + chat_template.role_start + "assistant" + chat_template.role_end + "".join(prefill)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_go_renders_the_trained_format(go_renderer, name):
    chat_template, prompts = CHAT_TEMPLATES[name], make_prompts()
    assert len(prompts) >= 200
    template = read_template(make_modelfile("x.gguf", chat_template=chat_template, context_length=64))
    assert render_messages(go_renderer, template, prompts) == [
        render_trained(chat_template, messages) for messages in prompts
    ]


@pytest.mark.slow
@pytest.mark.parametrize("system_prompt", NOT_HELD)
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_system_prompt_that_system_cannot_hold_is_served_by_the_template(go_renderer, name, system_prompt):
    """A request's own system prompt is served instead."""
    chat_template, prompts = CHAT_TEMPLATES[name], make_prompts()
    modelfile = make_modelfile("x.gguf", chat_template=chat_template, context_length=64, system_prompt=system_prompt)
    commands = dict(parse_modelfile(modelfile))
    assert "SYSTEM" not in commands
    system = Message("system", system_prompt)
    # Go's `if` takes an empty system message for none.
    prompts = [messages for messages in prompts if messages[0] != Message("system", "")]
    with_it = [messages if messages[0].role == "system" else [system, *messages] for messages in prompts]
    expected = [render_trained(chat_template, messages) for messages in with_it]
    assert render_messages(go_renderer, commands["TEMPLATE"], prompts) == expected


@pytest.mark.slow
def test_a_template_with_one_newline_less_is_told_apart(go_renderer):
    """Negative control."""
    prompts = make_prompts()
    wrong = LLAMA3.ollama_template.replace("<|end_header_id|>\n\n{{", "<|end_header_id|>\n{{")
    assert wrong != LLAMA3.ollama_template
    rendered = render_messages(go_renderer, wrong, prompts)
    assert all(text != render_trained(LLAMA3, turns) for text, turns in zip(rendered, prompts, strict=True))


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_jinja_renders_what_the_modelfile_renders(name):
    """Both templates have one format: rendered by jinja2, the GGUF's differs only by BOS at the start.

    The server appends a prefill: llama.cpp's and transformers' chat functions remove it before they render.
    """
    import jinja2

    chat_template = CHAT_TEMPLATES[name]
    template = jinja2.Environment().from_string(chat_template.jinja_template)
    for turns in make_prompts():
        prefill = [turn.content for turn in turns[-1:] if turn.role == "assistant"]
        messages = [{"role": turn.role, "content": turn.content} for turn in turns[: len(turns) - len(prefill)]]
        rendered = template.render(messages=messages, add_generation_prompt=True, bos_token=chat_template.beginning)
        assert rendered + "".join(prefill) == chat_template.beginning + render_trained(chat_template, turns)
