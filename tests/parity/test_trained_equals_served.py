"""Trained ids equal served ids: llama.cpp renders and tokenizes every conversation to the ids of its row.

llama.cpp runs in this process on a GGUF of our export, with the real tokenizers and a model of a few random weights.
"""

import dataclasses
import json
import random
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import REPOSITORY, TINY_TIED
from tests.conversations import ODD_CONTENTS, make_conversations, make_prompts
from tests.tokenizer_files import find_llama3_tokenizer, make_random_texts, write_smollm2_tokenizer
from tune2gguf.base.random_base import write_random_base
from tune2gguf.data import Message
from tune2gguf.data.messages import read_conversation
from tune2gguf.export.pipeline import export_base
from tune2gguf.model.architectures import Architecture
from tune2gguf.serve.llama_cpp import LlamaCppModel, open_model
from tune2gguf.tokenizer.llama3 import make_llama3_tokenizer_json
from tune2gguf.tokenizer.templates import CHAT_TEMPLATES
from tune2gguf.tokenizer.tokenizer import ChatTokenizer, load_tokenizer


class Served(NamedTuple):
    tokenizer: ChatTokenizer
    model: LlamaCppModel


def make_base(base_dir: Path, tokenizer: str) -> None:
    """Write a base of few weights with the real tokenizer, as tokenizer.json, which loads faster."""
    if tokenizer == "llama3":
        write_random_base(_make_architecture(128_256), base_dir, kind="float32")
        content = make_llama3_tokenizer_json(find_llama3_tokenizer())
        (base_dir / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    else:
        write_random_base(_make_architecture(49_152), base_dir, kind="float32")
        write_smollm2_tokenizer(base_dir)


def serve(base_dir: Path, chat_template: str) -> Served:
    gguf_path = export_base(
        base_dir, base_dir / f"{chat_template}.gguf", quantization="F16", chat_template=chat_template, show=False
    )
    return Served(load_tokenizer(base_dir, chat_template=chat_template), open_model(gguf_path, context_length=512))


def _make_architecture(vocab_size: int) -> Architecture:
    return Architecture(**{**vars(TINY_TIED), "vocab_size": vocab_size, "num_layers": 1})


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="module", params=["llama3", "llama3_1", "chatml"])
def served(request, bases) -> Served:
    base_dir = bases / request.param.removesuffix("_1")
    if not base_dir.exists():
        make_base(base_dir, base_dir.name)
    return serve(base_dir, request.param)


@cache
def make_corpus() -> list[list[Message]]:
    """Return conversations as read: the quickstart's, some of every shape, and random ones with odd contents."""
    lines = (REPOSITORY / "examples/quickstart/train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:100]]
    generator = random.Random(0)
    for number in range(300):
        turns = [("system", generator.choice(["", *ODD_CONTENTS]))] if number % 3 == 0 else []
        for _ in range(generator.randrange(1, 4)):
            turns += [("user", draw_content(generator)), ("assistant", draw_content(generator))]
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    read = [read_conversation(row, format="openai") for row in rows]
    return [list(conversation.messages) for conversation in [*read, *make_conversations()]]


def draw_content(generator: random.Random) -> str:
    return generator.choice(["", " ", "\n"]).join(generator.choices(ODD_CONTENTS, k=generator.randrange(1, 4)))


def render_served(served: Served, messages: list[Message]) -> list[int]:
    """Return llama.cpp's prompt ids for the messages, up to the reply."""
    text = served.model.apply_template([{"role": turn.role, "content": turn.content} for turn in messages])
    beginning = served.tokenizer.chat_template.beginning
    # The server adds BOS when it tokenizes, and removes a rendered one first.
    return served.model.tokenize(text.removeprefix(beginning) if beginning else text, adds_bos=bool(beginning))


def test_every_conversation_is_served_with_the_ids_it_was_trained_on(served):
    """A further question makes the template render the whole conversation, replies included."""
    corpus = make_corpus()
    assert len(corpus) >= 400
    different = []
    for messages in corpus:
        ids, _ = served.tokenizer.encode_conversation(messages)
        if render_served(served, [*messages, Message("user", "And then?")])[: len(ids)] != ids:
            different.append(messages)
    assert different == []


def test_every_reply_is_trained_behind_the_prompt_it_is_served_with(served):
    for messages in make_corpus():
        ids, supervised = served.tokenizer.encode_conversation(messages)
        prompt = render_served(served, messages[:-1])
        assert served.tokenizer.encode_prompt(messages[:-1]) == prompt
        assert ids[: len(prompt)] == prompt
        end = ids.index(served.tokenizer.end_of_turn_id, len(prompt))
        assert all(supervised[len(prompt) : end + 1]) and not any(supervised[end + 1 :])


def test_every_prompt_is_served_as_it_is_sent(served):
    """No template strips white space around contents, and a last assistant message is a prefill."""
    for messages in make_prompts():
        prefill = "".join(turn.content for turn in messages[-1:] if turn.role == "assistant")
        asked = messages[:-1] if prefill else messages
        assert render_served(served, messages) == served.tokenizer.encode_prompt(asked) + (
            served.model.tokenize(prefill) if prefill else []
        )


def test_the_chat_endpoint_counts_as_many_prompt_tokens_as_were_trained(served):
    for messages in make_corpus()[:100:20]:
        question = [{"role": turn.role, "content": turn.content} for turn in messages[:-1]]
        reply = served.model.chat(question, max_tokens=1)
        assert reply.num_prompt_tokens == len(served.tokenizer.encode_prompt(messages[:-1]))


def test_any_text_is_tokenized_as_llama_cpp_does(served):
    different = [
        text for text in make_random_texts(1000) if served.tokenizer.encode(text) != served.model.tokenize(text)
    ]
    assert different == []


@pytest.mark.parametrize(
    "texts", [["one"], ["one", "two"], ["one\n", " two", "three"], ["", "one"], ["one", "", "two"]]
)
def test_content_in_parts_is_trained_as_it_is_served(served, texts):
    content = [{"type": "text", "text": text} for text in texts]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes."}]
    messages = read_conversation({"messages": turns}, format="openai").messages
    ids, _ = served.tokenizer.encode_conversation(messages)
    rendered = served.model.apply_template(turns[:1])
    beginning = served.tokenizer.chat_template.beginning
    prompt = served.model.tokenize(
        rendered.removeprefix(beginning) if beginning else rendered, adds_bos=bool(beginning)
    )
    assert ids[: len(prompt)] == prompt
    if texts == ["one", "two"]:
        glued = [Message("user", "".join(texts)), messages[1]]
        assert served.tokenizer.encode_conversation(glued)[0][: len(prompt)] != prompt


def test_any_white_space_around_a_content_is_served_as_it_is_sent(served):
    """Every character below U+3001 that may count as white space, before and after a word."""
    candidates = [chr(code) for code in range(1, 0x3001) if chr(code).isspace() or code < 0x20]
    assert len(candidates) > 40
    for character in candidates:
        messages = [Message("user", f"{character}word{character}")]
        assert served.tokenizer.encode_prompt(messages) == render_served(served, messages), hex(ord(character))
    stripped = served.tokenizer.encode_prompt([Message("user", "word")])
    assert render_served(served, [Message("user", " word\n")]) != stripped, "negative control: a template that strips"


def test_special_tokens_spelled_in_content_are_where_trained_and_served_differ(served):
    """Deliberately: the server reads them as special tokens, training does not. data.json counts such rows."""
    spelled = served.tokenizer.chat_template.end_of_turn
    messages = [Message("user", f"What is {spelled}?")]
    trained, prompt = served.tokenizer.encode_prompt(messages), render_served(served, messages)
    end_of_turn = served.tokenizer.end_of_turn_id
    assert prompt.count(end_of_turn) == trained.count(end_of_turn) + 1


def test_another_template_is_found_different(served):
    """Negative control: with or without the date block of Meta's templates, every prompt has other ids."""
    other = {"llama3": "llama3_1", "llama3_1": "llama3"}.get(served.tokenizer.chat_template.name)
    if other is None:
        pytest.skip("the date block is Llama's")
    trained = dataclasses.replace(served.tokenizer, chat_template=CHAT_TEMPLATES[other])
    for messages in make_corpus()[:50]:
        assert trained.encode_prompt(messages[:-1]) != render_served(served, messages[:-1])
