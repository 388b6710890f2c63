"""Conversations with tools have the same ids in training, in llama.cpp's server and in Ollama's TEMPLATE.

They equal transformers' ids with Meta's published template, and with Qwen2.5's for ChatML. The published templates are
in llama.cpp's source, which install_oracle.sh fetches.
"""

from __future__ import annotations

import copy
import json
import shutil
from functools import cache
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.conversations import make_prompts
from tests.parity.go_renderer import render_messages, render_requests
from tests.parity.llama_cpp_oracle import get_source
from tests.parity.test_modelfile_renders_as_trained import read_template, render_trained
from tests.parity.test_trained_equals_served import Served, make_base
from tests.tool_conversations import (
    ANSWER,
    ASK,
    CALLS,
    DEPART,
    LISTS,
    PLAIN,
    TOOL_LISTS,
    calling,
    make_tool_conversations,
    result,
)
from tune2gguf.data.messages import read_conversation
from tune2gguf.export.modelfile import make_modelfile
from tune2gguf.export.pipeline import export_base
from tune2gguf.serve.llama_cpp import open_model
from tune2gguf.tokenizer.conversation import Conversation, Message, cut_before_reply, make_request_messages
from tune2gguf.tokenizer.templates import CHAT_TEMPLATES, ChatTemplate
from tune2gguf.tokenizer.tokenizer import load_tokenizer

PUBLISHED = {
    "llama3_1": ["meta-llama-Llama-3.1-8B-Instruct.jinja", "meta-llama-Llama-3.2-3B-Instruct.jinja"],
    "chatml": ["Qwen-Qwen2.5-7B-Instruct.jinja"],
}


@cache
def make_requests(name: str) -> list[Conversation]:
    """Return clients' requests: every row up to its last reply, and beyond it with the results of its calls."""
    requests = []
    for conversation in make_tool_conversations(name):
        messages, tools = conversation.messages, conversation.tools
        results = [Message("tool", f"done {number}") for number in range(len(messages[-1].tool_calls))]
        beyond = (*messages, *(results or [Message("user", "And then?")]))
        requests += [Conversation(messages[:-1], tools=tools), Conversation(beyond, tools=tools)]
    return requests


def write_out(chat_template: ChatTemplate, request: Conversation) -> str:
    """Return the trained text without BOS; plain messages as in test_modelfile_renders_as_trained."""
    plain = chat_template.write_out(request.messages, request.tools, chat_template.system_prefix)
    rendered = "".join(
        chat_template.role_start + one.role + chat_template.role_end + one.content
        + chat_template.end_of_turn + chat_template.turn_separator
        for one in plain
    )  # fmt: skip
    return rendered + chat_template.role_start + "assistant" + chat_template.role_end


def render_jinja(template: str, request: Conversation, **options: object) -> str:
    """Render with transformers' jinja environment."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(template).render(
        messages=make_request_messages(request.messages, arguments_as_text=False),
        tools=list(request.tools) or None,
        add_generation_prompt=True,
        **options,
    )


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_jinja_renders_what_is_trained(name):
    chat_template, requests = CHAT_TEMPLATES[name].with_tools(), make_requests(name)
    assert len(requests) >= 80
    for request in requests:
        rendered = render_jinja(chat_template.jinja_template, request, bos_token=chat_template.beginning)
        assert rendered == chat_template.beginning + write_out(chat_template, request)


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_jinja_with_tools_renders_conversations_without_them_as_the_plain_one(name):
    chat_template = CHAT_TEMPLATES[name]
    for messages in make_prompts():
        if messages[-1].role != "assistant":
            request = Conversation(tuple(messages))
            options = {"bos_token": chat_template.beginning}
            plain = render_jinja(chat_template.jinja_template, request, **options)
            assert render_jinja(chat_template.jinja_with_tools, request, **options) == plain


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_tool_is_rendered_alike_however_a_client_orders_its_keys(name):
    """The row's tools as read and the client's as sent render alike, without unset fields."""
    chat_template = CHAT_TEMPLATES[name]
    for tools in TOOL_LISTS:
        row = {"tools": tools, "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
        read = read_conversation(row, format="openai")
        sent = Conversation(read.messages[:-1], tools=tuple(tools))
        assert json.dumps(read.tools) != json.dumps(tools), "negative control: their keys were in another order"
        rendered = render_jinja(chat_template.jinja_with_tools, sent, bos_token=chat_template.beginning)
        trained = write_out(chat_template, Conversation(read.messages[:-1], tools=read.tools))
        assert rendered == chat_template.beginning + trained


def read_ollama_template(name: str, system_prompt: str | None = None) -> str:
    chat_template = CHAT_TEMPLATES[name].with_tools()
    modelfile = make_modelfile("x.gguf", chat_template=chat_template, context_length=64, system_prompt=system_prompt)
    return read_template(modelfile)


def make_ollama_requests(requests: list[Conversation]) -> list[dict]:
    return [
        {"messages": make_request_messages(one.messages, arguments_as_text=False), "tools": list(one.tools)}
        for one in requests
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_go_renders_what_is_trained(go_renderer, name):
    chat_template, requests = CHAT_TEMPLATES[name], make_requests(name)
    rendered = render_requests(go_renderer, read_ollama_template(name), make_ollama_requests(requests))
    assert rendered == [write_out(chat_template, request) for request in requests]


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_go_renders_conversations_without_tools_as_the_plain_template_does(go_renderer, name):
    chat_template, prompts = CHAT_TEMPLATES[name], make_prompts()
    rendered = render_messages(go_renderer, read_ollama_template(name), prompts)
    assert rendered == [render_trained(chat_template, messages) for messages in prompts]


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_go_serves_the_system_prompt_that_the_template_holds_with_tools_too(go_renderer, name):
    chat_template = CHAT_TEMPLATES[name]
    held = Message("system", "no-break\xa0space")
    # Go's `if` takes an empty system message for none.
    requests = [one for one in make_requests(name) if one.messages[0] != Message("system", "")]
    requests += [Conversation((Message("user", "Hi"),))]
    rendered = render_requests(go_renderer, read_ollama_template(name, held.content), make_ollama_requests(requests))
    with_it = [
        one if one.messages[0].role == "system" else Conversation((held, *one.messages), tools=one.tools)
        for one in requests
    ]
    assert rendered == [write_out(chat_template, request) for request in with_it]


@pytest.mark.slow
def test_a_template_that_leaves_json_to_go_is_told_apart(go_renderer):
    """Negative control: Go's JSON has no spaces, another order, and escapes."""
    requests = [one for one in make_requests("chatml") if one.tools]
    template = read_ollama_template("chatml")
    begin, end = template.index("{{ range .Tools }}\n"), template.index("{{ end }}\n</tools>")
    wrong = template[:begin] + "{{ range .Tools }}\n{{ json . }}" + template[end:]
    rendered = render_requests(go_renderer, wrong, make_ollama_requests(requests))
    trained = [write_out(CHAT_TEMPLATES["chatml"], request) for request in requests]
    assert all(one != other for one, other in zip(rendered, trained, strict=True))


def read_published(file_name: str) -> str:
    path = get_source() / "models" / "templates" / file_name
    if not path.is_file():
        pytest.skip("llama.cpp's source is not there (tests/parity/install_oracle.sh)")
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "file_name"), [(name, one) for name, files in PUBLISHED.items() for one in files])
def test_transformers_renders_the_published_template_to_what_is_trained(name, file_name):
    """There are two exceptions.

    Meta's template quotes results that are text, so they are passed as objects. Qwen has a system message of its own.
    """
    chat_template, published, num_compared = CHAT_TEMPLATES[name], read_published(file_name), 0
    options = {"bos_token": chat_template.beginning, "date_string": "26 Jul 2024"}
    for request in make_requests(name):
        messages = request.messages
        if name == "chatml" and (messages[0].role != "system" or not messages[0].content):
            continue
        results = [one.content for one in messages if one.role == "tool"]
        if name == "llama3_1" and not all(one.startswith("{") for one in results):
            continue
        rendered = render_published(published, request, **options)
        assert rendered == chat_template.beginning + write_out(chat_template, request)
        num_compared += 1
    assert num_compared >= 25
    other = render_published(published, request, **options | {"date_string": "27 Jul 2024"})
    assert name == "chatml" or other != rendered, "negative control: another date is another prompt"


def render_published(published: str, request: Conversation, **options: object) -> str:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    messages = make_request_messages(request.messages, arguments_as_text=False)
    for message in messages:
        if message["role"] == "tool" and "ipython" in published and message["content"].startswith("{"):
            message["content"] = json.loads(message["content"])
    return _compile_jinja_template(published).render(
        messages=messages, tools=list(request.tools) or None, add_generation_prompt=True, **options
    )


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="module", params=["llama3", "llama3_1", "chatml"])
def served(request, bases) -> Served:
    """Start llama.cpp's server with the real tokenizer and the template with tools."""
    base_dir = bases / request.param.removesuffix("_1")
    if not base_dir.exists():
        make_base(base_dir, base_dir.name)
    path = export_base(
        base_dir,
        base_dir / f"{request.param}.gguf",
        quantization="F16",
        chat_template=request.param,
        takes_tools=True,
        show=False,
    )
    return Served(load_tokenizer(base_dir, chat_template=request.param), open_model(path, context_length=2048))


def serve(served: Served, request: Conversation) -> list[int]:
    text = served.model.apply_template(make_request_messages(request.messages), tools=request.tools)
    beginning = served.tokenizer.chat_template.beginning
    return served.model.tokenize(text.removeprefix(beginning) if beginning else text, adds_bos=bool(beginning))


def test_llama_cpp_serves_the_ids_that_are_trained(served):
    different = []
    for request in make_requests(served.tokenizer.chat_template.name):
        if serve(served, request) != served.tokenizer.encode_prompt(request.messages, request.tools):
            different.append(request)
    assert different == []


def test_every_reply_and_call_is_trained_behind_the_prompt_it_is_served_with(served):
    """The last reply or call and its end are supervised; results and definitions are not."""
    for conversation in make_tool_conversations(served.tokenizer.chat_template.name):
        ids, supervised = served.tokenizer.encode_conversation(conversation.messages, conversation.tools)
        prompt = serve(served, Conversation(conversation.messages[:-1], tools=conversation.tools))
        assert ids[: len(prompt)] == prompt
        end = ids.index(served.tokenizer.end_of_turn_id, len(prompt))
        assert all(supervised[len(prompt) : end + 1]) and not any(supervised[end + 1 :])
        *_, reply = served.tokenizer.write_out(conversation.messages, conversation.tools)
        assert served.tokenizer.decode(ids[len(prompt) : end]) == reply.content
        plain = served.tokenizer.write_out(conversation.messages, conversation.tools)
        num_trained = sum(one.role == "assistant" and one.is_trained for one in plain)
        runs = sum(now and not before for before, now in zip([False, *supervised], supervised, strict=False))
        assert runs == num_trained


def test_another_order_of_properties_would_be_found(served):
    """Negative control for the rendering by hand."""
    request = next(one for one in make_requests("llama3_1") if one.tools and "Zone" in str(one.tools))
    changed = copy.deepcopy(request.tools)
    changed[0]["function"]["description"] += "!"
    assert serve(served, request) != served.tokenizer.encode_prompt(request.messages, changed)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_call_that_was_learned_is_read_back_by_the_chat_api(bases, tmp_path, name):
    """A tiny model memorizes a few rows. Through the server's API it calls or talks as trained."""
    base_dir = bases / name.removesuffix("_1")
    if not base_dir.exists():
        make_base(base_dir, base_dir.name)
    tokenizer = load_tokenizer(base_dir, chat_template=name)
    two = [DEPART, CALLS["book"][0]] if name == "chatml" else [DEPART]
    rows = [
        {"tools": [PLAIN, LISTS], "messages": [{"role": "user", "content": "When?"}, calling(DEPART)]},
        {"tools": [PLAIN, LISTS], "messages": [{"role": "user", "content": "Both!"}, calling(*two)]},
        {"tools": [PLAIN, LISTS], "messages": [{"role": "user", "content": "Hello"}, ANSWER]},
        {"tools": [PLAIN, LISTS], "messages": [ASK, calling(DEPART), result("7:10"), ANSWER]},
    ]
    conversations = [read_conversation(row, format="openai") for row in rows]
    learn_by_heart(
        base_dir, tmp_path / "base", [tokenizer.encode_conversation(one.messages, one.tools) for one in conversations]
    )
    options = {"quantization": "F32", "chat_template": name, "takes_tools": True, "show": False}
    model = open_model(export_base(tmp_path / "base", tmp_path / "x.gguf", **options), context_length=2048)
    for conversation in conversations:
        prompt = cut_before_reply(conversation)
        request = {"messages": make_request_messages(prompt.messages), "tools": list(prompt.tools), "temperature": 0}
        [choice] = model.post("/v1/chat/completions", request | {"max_tokens": 200})["choices"]
        calls = [one["function"] for one in choice["message"].get("tool_calls", [])]
        made = tuple({"name": one["name"], "arguments": json.loads(one["arguments"])} for one in calls)
        assert made == prompt.reply.tool_calls
        assert choice["finish_reason"] == ("tool_calls" if made else "stop")
        assert made or choice["message"]["content"] == prompt.reply.content
        reply = model.chat(request["messages"], tools=prompt.tools, max_tokens=200)
        assert (reply.tool_calls, reply.ended_by_itself) == (made, True)


def learn_by_heart(base_dir: Path, trained_dir: Path, rows: list[tuple[list[int], list[bool]]]) -> None:
    """Train all weights of a base on rows until every supervised token is near certain."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(300):
        worst = 0.0
        for ids, supervised in rows:
            places = torch.tensor([place for place in range(1, len(ids)) if supervised[place]])
            hidden = model.model(torch.tensor([ids])).last_hidden_state[0, places - 1]
            logits, targets = model.lm_head(hidden), torch.tensor(ids)[places]
            losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            worst = max(worst, float(losses.max()))
            losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if worst < 0.05:
            break
    assert worst < 0.05, "it has to know them by heart"
    shutil.copytree(base_dir, trained_dir)
    weights = {key: value.contiguous() for key, value in model.state_dict().items() if key != "lm_head.weight"}
    save_file(weights, trained_dir / "model.safetensors", metadata={"format": "pt"})
