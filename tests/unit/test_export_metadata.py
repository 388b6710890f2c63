"""Metadata of an export: the GGUF's tokenizer and chat template, and the Modelfile."""

import json
import math
import re

import pytest
from gguf import TokenType

from tests.parity.gguf_models import SMALL_MODELS, write_small_run
from tune2gguf.export.gguf_file.vocabulary import read_vocabulary
from tune2gguf.export.modelfile import make_modelfile
from tune2gguf.export.pipeline import export_run
from tune2gguf.tokenizer.templates import CHATML, LLAMA3

LLAMA_MODEL, _, CHATML_MODEL = SMALL_MODELS


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory):
    return write_small_run(LLAMA_MODEL, tmp_path_factory.mktemp("llama")).parent


@pytest.fixture
def base_dir(tmp_path):
    return write_small_run(CHATML_MODEL, tmp_path).parent / "base"


def edit_json(path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def read_keys(gguf_path) -> dict:
    from gguf import GGUFReader

    fields = GGUFReader(gguf_path).fields
    return {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}


def test_llama_file_holds_the_keys_in_llama_cpp_order(llama_dir):
    file = export_run(llama_dir / LLAMA_MODEL.name, show=False).models[0]
    keys = read_keys(file.gguf_path)
    assert list(keys) == [
        "general.architecture",
        "general.type",
        "general.sampling.top_p",
        "general.sampling.temp",
        "general.name",
        "general.finetune",
        "general.basename",
        "general.size_label",
        "llama.block_count",
        "llama.context_length",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.attention.head_count_kv",
        "llama.rope.freq_base",
        "llama.attention.layer_norm_rms_epsilon",
        "llama.attention.key_length",
        "llama.attention.value_length",
        "llama.vocab_size",
        "llama.rope.dimension_count",
        "tokenizer.ggml.model",
        "tokenizer.ggml.pre",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.token_type",
        "tokenizer.ggml.merges",
        "tokenizer.ggml.bos_token_id",
        "tokenizer.ggml.eos_token_id",
        "tokenizer.ggml.add_bos_token",
        "tokenizer.ggml.add_eos_token",
        "tokenizer.ggml.add_sep_token",
        "tokenizer.chat_template",
        "general.quantization_version",
        "general.file_type",
    ]
    tokens = keys["tokenizer.ggml.tokens"]
    assert keys["general.name"] == "Small Llama 3.2 Instruct"
    assert keys["tokenizer.ggml.pre"] == "llama-bpe"
    assert tokens[keys["tokenizer.ggml.bos_token_id"]] == "<|begin_of_text|>"
    assert tokens[keys["tokenizer.ggml.eos_token_id"]] == "<|eot_id|>"
    assert keys["tokenizer.ggml.add_bos_token"] is True
    assert keys["tokenizer.chat_template"] == LLAMA3.jinja_template
    assert keys["general.file_type"] == 15


def test_token_types_tell_text_from_control_and_from_holes(llama_dir):
    vocabulary = read_vocabulary(llama_dir / "base", vocab_size=288, chat_template=LLAMA3)
    types = dict(zip(vocabulary.tokens, vocabulary.token_types, strict=True))
    assert types["the"] == TokenType.NORMAL
    assert types["<|eot_id|>"] == TokenType.CONTROL
    assert types["[PAD287]"] == TokenType.UNUSED
    assert vocabulary.merges == ["t h", "th e"]


def test_added_tokens_that_are_text_are_user_defined(base_dir):
    entry = {"id": 270, "content": "<tool>", "special": False}
    edit_json(base_dir / "tokenizer.json", lambda content: content["added_tokens"].append(entry))
    vocabulary = read_vocabulary(base_dir, vocab_size=288, chat_template=CHATML)
    assert vocabulary.tokens[270] == "<tool>" and vocabulary.token_types[270] == TokenType.USER_DEFINED


def test_end_of_sequence_is_the_trained_end_of_turn_whatever_the_base_says(base_dir):
    edit_json(base_dir / "tokenizer_config.json", lambda content: content.update(eos_token="<|endoftext|>"))
    vocabulary = read_vocabulary(base_dir, vocab_size=288, chat_template=CHATML)
    assert vocabulary.tokens[vocabulary.special_ids["eos"]] == "<|im_end|>"
    assert list(vocabulary.special_ids) == ["bos", "eos"]
    assert (vocabulary.early_flags | vocabulary.late_flags)["bos"] is False, "ChatML was trained without BOS"


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["pre_tokenizer"]["pretokenizers"].pop(0),
        lambda content: content["pre_tokenizer"]["pretokenizers"][0].update(individual_digits=False),
        lambda content: content["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        lambda content: content.update(normalizer={"type": "NFC"}),
        lambda content: content["model"].update(ignore_merges=True),
        lambda content: content["model"].update(type="Unigram"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_split_otherwise_is_refused(base_dir, change):
    edit_json(base_dir / "tokenizer.json", change)
    with pytest.raises(ValueError, match=r"tokenizer\.json: this tokenizer is neither Llama 3's nor SmolLM2's"):
        read_vocabulary(base_dir, vocab_size=288, chat_template=CHATML)


def test_a_chat_template_without_its_tokens_is_refused(base_dir):
    with pytest.raises(ValueError, match=r"lacks <\|begin_of_text\|>, <\|eot_id\|>, which chat template 'llama3'"):
        read_vocabulary(base_dir, vocab_size=288, chat_template=LLAMA3)


def test_more_tokens_than_the_model_has_rows_are_refused(base_dir):
    with pytest.raises(ValueError, match=r"has token id 260, but config\.json's vocab_size is 200"):
        read_vocabulary(base_dir, vocab_size=200, chat_template=CHATML)


def test_modelfile_serves_the_trained_format():
    text = make_modelfile("x.gguf", chat_template=LLAMA3, context_length=2048)
    assert "FROM ./x.gguf\n" in text
    assert f'TEMPLATE """{LLAMA3.ollama_template}"""\n' in text
    assert "<|begin_of_text|>" not in text, "the runtime adds it; a second one would double it"
    assert "PARAMETER num_ctx 2048\n" in text
    assert "SYSTEM" not in text
    stops = [line for line in text.splitlines() if line.startswith("PARAMETER stop")]
    assert stops == [
        f'PARAMETER stop "<|{name}|>"' for name in ("start_header_id", "end_header_id", "eot_id", "eom_id")
    ]
    for line in ("temperature 0", "top_p 1", "top_k 0", "min_p 0", "repeat_penalty 1"):
        assert f"PARAMETER {line}\n" in text


def test_modelfile_holds_the_temperature_that_is_asked_for_and_the_adapter():
    text = make_modelfile("x.gguf", adapter_name="y.gguf", chat_template=CHATML, context_length=64, temperature=0.75)
    assert "FROM ./x.gguf\nADAPTER ./y.gguf\n" in text and "PARAMETER temperature 0.75\n" in text
    for temperature in (-0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"must be finite and at least 0 \(greedy\)"):
            make_modelfile("x.gguf", chat_template=CHATML, context_length=64, temperature=temperature)


def test_modelfile_holds_the_one_system_prompt():
    text = make_modelfile(
        "x.gguf", chat_template=CHATML, context_length=64, system_prompt='You are "Marlo".\nBe brief.'
    )
    assert 'SYSTEM """You are "Marlo".\nBe brief."""\n' in text


def parse_modelfile(text: str) -> list[tuple[str, str]]:
    """Return (command, value) pairs like Ollama's parser: it drops characters that do not print, except white space.

    A value that starts with three quotes ends at the first line that ends with three quotes, ignoring spaces.
    """
    commands = []
    while text := text.lstrip(" \t\r\n"):
        if text.startswith("#"):
            _, _, text = text.partition("\n")
            continue
        name, _, text = text.partition(" ")
        end = re.match(r'"""(?s:.*?)"""[ \t]*(?=[\r\n])' if text.startswith('"""') else "[^\r\n]*", text).end()
        value, text = text[:end].strip(" \t"), text[end:]
        value = value[3:-3] if value.startswith('"""') else value
        commands.append((name, "".join(one for one in value if one.isprintable() or one in "\t\r\n")))
    return commands


HELD = (
    *('You are "Marlo".', 'a """ b', 'ends with "', 'ends with """', '"', '"""x', 'one ""\ntwo', ""),
    *("{{ .Role }}", "one\r\ntwo", "🚢 日本", "PARAMETER stop x\nFROM y\n# z"),
)
NOT_HELD = (
    *('a """\nb', '"""\nx', 'a """ \t\r\nb', "no-break\xa0space", "joined 👩\u200d🚀"),
    *("\u2028x", "\x1b[31m", '\ufeffx\x85\x7f\\n"'),
)


@pytest.mark.parametrize("system_prompt", HELD)
def test_system_is_what_was_trained_when_ollama_has_read_it(system_prompt):
    text = make_modelfile(
        "x.gguf", chat_template=CHATML, context_length=64, system_prompt=system_prompt, licence='a "b"'
    )
    commands = parse_modelfile(text)
    assert [name for name, _ in commands if name != "PARAMETER"] == ["FROM", "TEMPLATE", "SYSTEM", "LICENSE"]
    assert dict(commands)["SYSTEM"] == system_prompt and dict(commands)["LICENSE"] == 'a "b"'


@pytest.mark.parametrize("name", ["a b.gguf", 'a"b".gguf', "ä 日本 🚢.gguf", "'x' # y.gguf"])
def test_from_is_the_files_name_when_ollama_has_read_it(name):
    commands = parse_modelfile(make_modelfile(name, chat_template=CHATML, context_length=64))
    assert commands[0] == ("FROM", f"./{name}")


def test_what_ollama_cannot_read_is_refused():
    with pytest.raises(ValueError, match="Ollama cannot find a file of this name; rename the run's folder"):
        make_modelfile("a\xa0b.gguf", chat_template=CHATML, context_length=64)
    with pytest.raises(ValueError, match='a line of the licence ends with """'):
        make_modelfile("x.gguf", chat_template=CHATML, context_length=64, licence='a """\nb')
