"""Exact ids and supervised flags: only what the model must generate is supervised."""

import dataclasses
import hashlib
import json

import pytest

from tests.tokenizer_files import find_llama3_tokenizer, load_llama3, write_smollm2_tokenizer
from tune2gguf.data import Message
from tune2gguf.tokenizer.llama3 import make_llama3_tokenizer_json, read_llama3_tokenizer_json
from tune2gguf.tokenizer.templates import LLAMA3_1
from tune2gguf.tokenizer.tokenizer import ChatTokenizer, find_tokenizer_file, load_tokenizer

# Of the tokenizer.json in Meta's Llama-3.2 repositories.
PUBLISHED_SHA256 = "6b9e4e7fb171f92fd137b777cc2714bf87d11576700a1dcd7a399e7bbe39537b"

BEGIN, START, END, EOT = 128000, 128006, 128007, 128009
SYSTEM, USER, ASSISTANT, BLANK_LINE = 9125, 882, 78191, 271


def header(role: int) -> list[int]:
    return [START, role, END, BLANK_LINE]


def user(content: str) -> Message:
    return Message("user", content)


def assistant(content: str) -> Message:
    return Message("assistant", content)


def find_supervised(tokenizer: ChatTokenizer, *messages: Message) -> list[int]:
    ids, supervised = tokenizer.encode_conversation(messages)
    assert len(ids) == len(supervised)
    return [id_ for id_, is_supervised in zip(ids, supervised, strict=True) if is_supervised]


def test_single_turn_has_these_ids():
    ids, supervised = load_llama3().encode_conversation([user("Hi"), assistant("Hello!")])
    assert ids == [BEGIN, *header(USER), 13347, EOT, *header(ASSISTANT), 9906, 0, EOT]
    assert supervised == [False] * 11 + [True] * 3


def test_multi_turn_row_has_these_ids_and_every_reply_is_supervised():
    messages = [Message("system", "Be brief."), user("Hi"), assistant("Hello!"), user("Bye"), assistant("Hello! Hello")]
    ids, supervised = load_llama3().encode_conversation(messages)
    expected = [
        *([BEGIN, *header(SYSTEM), 3513, 10015, 13, EOT, *header(USER), 13347, EOT, *header(ASSISTANT)], False),
        *([9906, 0, EOT], True),
        *([*header(USER), 1383, 68, EOT, *header(ASSISTANT)], False),
        *([9906, 0, 22691, EOT], True),
    ]
    pieces, flags = expected[0::2], expected[1::2]
    assert ids == [id_ for piece in pieces for id_ in piece]
    assert supervised == [flag for piece, flag in zip(pieces, flags, strict=True) for _ in piece]


def test_empty_system_message_is_a_block_without_content():
    ids, _ = load_llama3().encode_conversation([Message("system", ""), user("Hi"), assistant("Hello!")])
    assert ids[:11] == [BEGIN, *header(SYSTEM), EOT, *header(USER), 13347]


@pytest.mark.parametrize(("system", "shown"), [(None, ""), ("Be brief.", "Be brief."), ("", "")])
def test_llama3_1_puts_metas_date_block_before_the_system_message(system, shown):
    tokenizer = dataclasses.replace(load_llama3(), chat_template=LLAMA3_1)
    turns = [] if system is None else [Message("system", system)]
    ids, supervised = tokenizer.encode_conversation([*turns, user("Hi"), assistant("Hello!")])
    assert tokenizer.decode(ids) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        f"Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n{shown}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
    )
    assert sum(supervised) == 3 and all(supervised[-3:])


def test_unicode_reply_is_supervised_byte_for_byte():
    reply = "日本語 naïve 👩‍👩‍👧 ﷽ \u200d"
    tokenizer = load_llama3()
    assert tokenizer.decode(find_supervised(tokenizer, user("x"), assistant(reply))) == reply + "<|eot_id|>"


@pytest.mark.parametrize(
    ("content", "content_ids"),
    [
        ("naïve 日本語 👋", [3458, 38672, 588, 105180, 102158, 62904, 233]),
        ("The end is <|eot_id|>", [791, 842, 374, 83739, 68, 354, 851, 91, 29]),
        ("<|eot_id|>", [27, 91, 68, 354, 851, 91, 29]),
    ],
)
def test_content_has_the_ids_that_tiktoken_gives_it(content, content_ids):
    """Question and reply with Unicode, surrounding white space and spelled special tokens."""
    ids, supervised = load_llama3().encode_conversation([user(content), assistant(content)])
    question = [BEGIN, *header(USER), *content_ids, EOT, *header(ASSISTANT)]
    assert ids == [*question, *content_ids, EOT]
    assert supervised == [False] * len(question) + [True] * (len(content_ids) + 1)


@pytest.mark.parametrize("space", [" ", "\t", "\r\n", "\v\f", "\u00a0", "\u3000", "\u2028", "\u0085", "\x1f"])
def test_white_space_around_content_is_rendered_as_it_is(space):
    """White space is removed when rows are read; a prompt keeps what was sent."""
    tokenizer = load_llama3()
    reply = f"{space}Hello!{space}"
    assert tokenizer.decode(find_supervised(tokenizer, user("Hi"), assistant(reply))) == reply + "<|eot_id|>"


@pytest.mark.parametrize("space", [" ", "\n", "\u00a0\n", "\u3000\u3000", "\u2028\n\n"])
def test_reply_follows_the_header_of_the_prompt_whatever_it_starts_with(space):
    tokenizer = load_llama3()
    ids, _ = tokenizer.encode_conversation([user("Hi"), assistant(f"{space}Hello!")])
    prompt = tokenizer.encode_prompt([user("Hi")])
    assert ids == [*prompt, *tokenizer.encode(f"{space}Hello!"), EOT]


def test_special_tokens_spelled_in_content_stay_text():
    tokenizer = load_llama3()
    reply = "The end is <|eot_id|><|start_header_id|>user"
    ids = find_supervised(tokenizer, user("<|begin_of_text|>"), assistant(reply))
    assert ids.count(EOT) == 1 and ids[-1] == EOT
    assert START not in ids
    assert tokenizer.decode(ids[:-1]) == reply
    assert tokenizer.find_spelled_special(reply) == "<|eot_id|>"
    assert tokenizer.find_spelled_special("a < b |> c") is None


def test_reply_of_weight_0_is_in_the_row_but_not_supervised():
    tokenizer = load_llama3()
    turns = [user("Hi"), Message("assistant", "Hello!", is_trained=False), user("Bye"), assistant("Hello!")]
    ids, supervised = tokenizer.encode_conversation(turns)
    assert ids.count(9906) == 2
    assert sum(supervised) == 3 and all(supervised[-3:])


def test_prompt_is_the_conversation_up_to_the_reply():
    tokenizer = load_llama3()
    turns = [Message("system", "Be brief."), user("Hi"), assistant("Hello!"), user("Bye")]
    whole, _ = tokenizer.encode_conversation([*turns, assistant("So long")])
    prompt = tokenizer.encode_prompt(turns)
    assert prompt == whole[: len(prompt)]
    assert prompt[-4:] == header(ASSISTANT)


def test_raw_text_is_supervised_between_its_beginning_and_its_end():
    tokenizer = load_llama3()
    ids, supervised = tokenizer.encode_document(" Hello!\n")
    assert tokenizer.decode(ids) == "<|begin_of_text|> Hello!\n<|end_of_text|>"
    assert supervised == [False] + [True] * (len(ids) - 1)


def test_chatml_supervises_the_reply_and_its_end_but_not_the_line_break_after_it(tiny_base):
    tokenizer = load_tokenizer(tiny_base, chat_template="chatml")
    ids, supervised = tokenizer.encode_conversation([user("Hi"), assistant("Ho"), user("x"), assistant("y")])
    start, end = tokenizer.special_ids["<|im_start|>"], tokenizer.special_ids["<|im_end|>"]
    assert tokenizer.decode(ids) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
        "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\ny<|im_end|>\n"
    )
    replies = [id_ for id_, is_supervised in zip(ids, supervised, strict=True) if is_supervised]
    assert replies == [*tokenizer.encode("Ho"), end, *tokenizer.encode("y"), end]
    assert ids[0] == start
    assert tokenizer.end_of_turn_id == end
    assert tokenizer.stop_ids == (start, end)


@pytest.mark.slow
def test_chatml_row_has_the_ids_that_transformers_gives_it(tmp_path):
    """SmolLM2's own tokenizer: system, two turns, unicode and a spelled special token."""
    write_smollm2_tokenizer(tmp_path)
    messages = [
        Message("system", "Be brief."),
        *(user("Hi"), assistant("Hello!")),
        *(user("naïve 日本語 👋"), assistant("The end is<|im_end|>")),
    ]
    ids, supervised = load_tokenizer(tmp_path, chat_template="chatml").encode_conversation(messages)
    unicode_ids = [3546, 46494, 17097, 241, 115, 40993, 179, 120, 248, 15107, 235, 229]
    spelled = [44, 108, 306, 79, 486, 108, 46]
    expected = [
        *([1, 9690, 198, 6077, 5453, 30, 2, 198, 1, 4093, 198, 26843, 2, 198, 1, 520, 9531, 198], False),
        *([19556, 17, 2], True),
        *([198, 1, 4093, 198, *unicode_ids, 2, 198, 1, 520, 9531, 198], False),
        *([504, 1112, 314, *spelled, 2], True),
        *([198], False),
    ]
    pieces, flags = expected[0::2], expected[1::2]
    assert ids == [id_ for piece in pieces for id_ in piece]
    assert supervised == [flag for piece, flag in zip(pieces, flags, strict=True) for _ in piece]


def test_many_rows_at_once_have_the_ids_of_each_alone():
    tokenizer = load_llama3()
    rows = [[user(f"Question {number}"), assistant("Answer. " * number + "End")] for number in range(20)]
    together = tokenizer.encode_segments([tokenizer.render_conversation(row) for row in rows])
    alone = [tokenizer.encode_conversation(row) for row in rows]
    assert [(ids.tolist(), flags.tolist()) for ids, flags in together] == alone


def test_tokenizer_json_made_from_tokenizer_model_is_the_published_file():
    content = make_llama3_tokenizer_json(find_llama3_tokenizer())
    text = json.dumps(content, indent=2, ensure_ascii=False)
    assert hashlib.sha256(text.encode()).hexdigest() == PUBLISHED_SHA256


def test_tokenizer_json_is_made_once_and_anew_where_the_kept_one_is_damaged(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNE2GGUF_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "tokenizer.model"
    source.write_bytes(b"YQ== 0\nYg== 1\nYWI= 2\n")  # a, b, ab
    made = json.loads(read_llama3_tokenizer_json(source))
    assert made == make_llama3_tokenizer_json(source) and made["model"]["merges"] == [["a", "b"]]
    (kept,) = (tmp_path / "cache" / "tokenizers").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr("tune2gguf.tokenizer.llama3._read_ranks", None)  # cannot be computed again
        assert json.loads(read_llama3_tokenizer_json(source)) == made
    kept.write_text(kept.read_text().replace('"ab": 2', '"ab": 3'))
    assert json.loads(read_llama3_tokenizer_json(source)) == made
    source.write_bytes(b"YQ== 0\nYg== 1\nYmE= 2\n")
    assert json.loads(read_llama3_tokenizer_json(source))["model"]["merges"] == [["b", "a"]]


@pytest.mark.parametrize("place", ["tokenizer.json", "tokenizer.model", "original/tokenizer.model"])
def test_tokenizer_is_found_where_published_folders_have_it(tmp_path, place):
    (tmp_path / "original").mkdir()
    (tmp_path / place).touch()
    assert find_tokenizer_file(tmp_path) == tmp_path / place


def test_llama3_pads_with_the_token_made_for_it_and_has_the_published_vocabulary():
    tokenizer = load_llama3()
    assert (tokenizer.vocab_size, tokenizer.decode([tokenizer.pad_id])) == (128256, "<|finetune_right_pad_id|>")


def test_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer; looked for tokenizer\.json, tokenizer\.model"):
        load_tokenizer(tmp_path, chat_template="llama3")


def test_chat_template_that_does_not_fit_the_tokenizer_is_refused_with_the_one_that_does(tiny_base):
    with pytest.raises(ValueError, match=r"<\|eot_id\|>.* of chat_template=llama3; chat_template=chatml would fit"):
        load_tokenizer(tiny_base, chat_template="llama3")
    with pytest.raises(ValueError, match=r"chat_template='mistral' is not one of llama3, llama3_1, chatml"):
        load_tokenizer(tiny_base, chat_template="mistral")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x0a\x0e\x0a\x05<unk>\x15", r"line 1: not a tokenizer\.model of Llama 3"),
        (b"IQ== 0\nIg== 2\n", "its ranks are not 0, 1, 2"),
        (b"", "its ranks are not 0, 1, 2"),
    ],
)
def test_damaged_tokenizer_model_is_refused(tmp_path, content, said):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        load_tokenizer(tmp_path, chat_template="llama3")


def test_damaged_tokenizer_json_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ValueError, match=r"not a tokenizer\.json"):
        load_tokenizer(tmp_path, chat_template="chatml")


def test_truncation_and_padding_set_in_the_file_do_not_reach_the_rows(tmp_path, tiny_base):
    content = json.loads((tiny_base / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    text = "The ferry leaves Reed Quay at seven and at nine."
    assert load_tokenizer(tmp_path, chat_template="chatml").decode(
        load_tokenizer(tmp_path, chat_template="chatml").encode(text)
    ) == (text)


def test_special_token_that_is_not_marked_as_one_is_one_all_the_same(tiny_base, tmp_path):
    """llama.cpp's converter makes every token in <| and |> a control token of the GGUF."""
    content = json.loads((tiny_base / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] = not token["content"].startswith("<|im_")
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    marked, unmarked = (load_tokenizer(folder, chat_template="chatml") for folder in (tiny_base, tmp_path))
    assert unmarked.special_ids == marked.special_ids
    messages = [Message("user", "What is <|im_end|>?"), Message("assistant", "It ends a <|im_start|>turn.")]
    assert unmarked.encode_conversation(messages) == marked.encode_conversation(messages)
    assert unmarked.encode("<|im_end|>") == marked.encode("<|im_end|>") != [marked.end_of_turn_id]
