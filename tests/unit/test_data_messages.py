"""Row formats: all five give the same conversation, and untrainable rows are refused with the reason."""

import pytest

from tune2gguf.data.messages import AmbiguousFormatError, detect_format, digest, read_conversation
from tune2gguf.tokenizer.conversation import Conversation, Message


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


QUESTION, ANSWER = turn("user", "Hi"), turn("assistant", "Hello!")

SHAPES = [
    ("openai", {"messages": [QUESTION, ANSWER]}),
    ("openai", {"conversations": [QUESTION, ANSWER]}),
    ("openai", {"messages": [turn("user", [{"type": "text", "text": "Hi"}]), ANSWER], "id": 7}),
    ("sharegpt", {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}),
    ("sharegpt", {"messages": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello!"}]}),
    ("alpaca", {"instruction": "Hi", "output": "Hello!"}),
    ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello!"}),
    ("prompt_completion", {"prompt": "Hi", "completion": "Hello!"}),
]


@pytest.mark.parametrize(("format", "row"), SHAPES)
def test_every_shape_is_detected_and_becomes_the_same_conversation(format, row):
    assert detect_format(row) == format
    expected = Conversation((Message("user", "Hi"), Message("assistant", "Hello!")))
    assert read_conversation(row, format=format) == expected


def test_system_message_and_many_turns_are_kept():
    turns = [turn("system", "Be brief."), QUESTION, ANSWER, turn("user", "Bye"), turn("assistant", "So long")]
    messages = read_conversation({"messages": turns}, format="openai").messages
    assert [(message.role, message.content) for message in messages] == [
        (given["role"], given["content"]) for given in turns
    ]


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("sharegpt", {"system": "Be brief.", "conversations": SHAPES[3][1]["conversations"]}),
        ("openai", {"system": "Be brief.", "messages": [QUESTION, ANSWER]}),
        ("alpaca", {"system": "Be brief.", "instruction": "Hi", "output": "Hello!"}),
        ("prompt_completion", {"system": "Be brief.", "prompt": "Hi", "completion": "Hello!"}),
    ],
)
def test_system_column_is_the_system_message(format, row):
    messages = read_conversation(row, format=format).messages
    assert [message.role for message in messages] == ["system", "user", "assistant"]
    assert messages[0].content == "Be brief."


@pytest.mark.parametrize(
    ("format", "row", "unused"),
    [
        ("openai", {"messages": [QUESTION, ANSWER], "id": 7, "system": None}, ("id",)),
        ("openai", {"conversations": [QUESTION, ANSWER | {"thinking": "Hm."}]}, ("conversations[].thinking",)),
        ("openai", {"messages": [QUESTION | {"name": "Bo"}, ANSWER | {"weight": 1}]}, ("messages[].name",)),
        ("alpaca", {"instruction": "Hi", "output": "Hello!", "context": "x", "tags": []}, ("context",)),
        ("text", {"text": "Hi", "system": "x"}, ("system",)),
    ],
)
def test_keys_that_hold_something_and_are_not_used_are_named(format, row, unused):
    assert read_conversation(row, format=format).unused_keys == unused


def test_key_without_a_value_is_shown_as_such():
    with pytest.raises(ValueError, match=r"its keys \(prompt: null, completion\) fit no format"):
        detect_format({"prompt": None, "completion": "x"})


def test_alpaca_input_follows_the_instruction_after_an_empty_line():
    row = {"instruction": "Translate.", "input": "Hi", "output": "Salut"}
    assert read_conversation(row, format="alpaca").messages[0].content == "Translate.\n\nHi"


def test_raw_text_is_kept_as_it_is():
    assert detect_format({"text": " a\n"}) == "text"
    assert read_conversation({"text": " a\n"}, format="text") == Conversation(text=" a\n")


def test_weight_0_leaves_a_reply_out_of_training():
    turns = [QUESTION, turn("assistant", "Hmpf", weight=0), turn("user", "Again?"), turn("assistant", "Hi!", weight=1)]
    messages = read_conversation({"messages": turns}, format="openai").messages
    assert [message.is_trained for message in messages] == [True, False, True, True]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [QUESTION, ANSWER], "text": "<rendered>"},
        {"instruction": "Hi", "output": "Hello!", "prompt": "Hi", "completion": "Hello!"},
    ],
)
def test_row_that_fits_two_formats_asks_for_one(row):
    with pytest.raises(AmbiguousFormatError, match=r"fit the formats \w+ and \w+; say which with dataset.format=\w+"):
        detect_format(row)


def test_row_that_fits_no_format_says_what_was_looked_for():
    with pytest.raises(ValueError, match=r"its keys \(question, answer\) fit no format .*alpaca: instruction, output"):
        detect_format({"question": "Hi", "answer": "Hello!"})


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ("Hi", "'messages' must be a non-empty list, got str 'Hi'"),
        ([], "'messages' must be a non-empty list, got a list of 0"),
        (["Hi"], r"messages\[0\] must be an object with 'role' and 'content', got str 'Hi'"),
        ([{"content": "Hi"}], r"messages\[0\] has no 'role'; it has content"),
        ([{"role": "user"}], r"messages\[0\] has no 'content'; it has role"),
        ([turn("human", "Hi")], r"messages\[0\]: unknown role 'human'; known are system, user, assistant"),
        ([turn(None, "Hi")], r"messages\[0\]: unknown role None"),
        ([QUESTION, turn("assistant", None)], r"messages\[1\]: 'content' must be text, got null"),
        ([QUESTION, turn("assistant", 7)], r"messages\[1\]: 'content' must be text, got int 7"),
        ([turn("user", [{"type": "image_url"}])], r"content\[0\] is of type 'image_url'; only parts"),
        ([QUESTION, turn("assistant", " \n\u00a0")], r"message 2 \(assistant\) is empty"),
        ([turn("user", ""), ANSWER], r"message 1 \(user\) is empty"),
        ([QUESTION], "no message has role 'assistant'; there is no reply to train on"),
        ([turn("system", "Be brief.")], "no message has role 'assistant'; there is no reply to train on"),
        ([ANSWER], "message 1 has role 'assistant', expected 'user'"),
        ([QUESTION, QUESTION, ANSWER], "message 2 has role 'user', expected 'assistant'"),
        ([turn("system", "x"), ANSWER, QUESTION], "message 2 has role 'assistant', expected 'user'"),
        ([QUESTION, turn("system", "x"), ANSWER], "message 2 has role 'system', expected 'assistant'"),
        ([QUESTION, ANSWER, QUESTION], "the last message has role 'user', expected 'assistant'; end with a reply"),
        ([turn("user", "a\0b"), ANSWER], r"messages\[0\]: 'content' holds a NUL byte at character 1"),
        ([turn("user", "a\ud83d"), ANSWER], r"messages\[0\]: 'content' holds a lone surrogate at character 1"),
        ([QUESTION, turn("assistant", "x", weight=0)], "every reply has weight 0"),
        ([QUESTION, turn("assistant", "x", weight=0.5)], r"'weight' must be 0 \(not trained\) or 1, got 0.5"),
    ],
)
def test_conversation_that_cannot_be_trained_on_is_refused(turns, said):
    with pytest.raises(ValueError, match=said):
        read_conversation({"messages": turns}, format="openai")


@pytest.mark.parametrize(
    ("format", "row", "said"),
    [
        ("openai", {"text": "x"}, "'messages' is missing; the row has text"),
        ("sharegpt", {"conversations": [{"from": "bot", "value": "x"}]}, "unknown role 'bot'; known are human, gpt"),
        ("sharegpt", {"conversations": [QUESTION]}, r"conversations\[0\] has no 'from'; it has role, content"),
        ("alpaca", {"instruction": "Hi"}, "'output' is missing; the row has instruction"),
        ("alpaca", {"instruction": "Hi", "input": 3, "output": "x"}, "'input' must be text, got int 3"),
        ("alpaca", {"instruction": "Hi", "output": "x", "history": [["a", "b"]]}, "'history' is not supported"),
        ("prompt_completion", {"prompt": "Hi", "completion": ""}, r"message 2 \(assistant\) is empty"),
        (
            "prompt_completion",
            {"prompt": ["Hi"], "completion": "x"},
            r"prompt\[0\] must be an object with 'role' and 'content', got str 'Hi'",
        ),
        ("openai", {"system": 3, "messages": [QUESTION, ANSWER]}, "'system' must be text, got int 3"),
        (
            "openai",
            {"system": "x", "messages": [turn("system", "y"), QUESTION, ANSWER]},
            "both 'system' and a system m",
        ),
        (
            "openai",
            {
                "messages": [
                    turn("user", [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]),
                    ANSWER,
                ]
            },
            r"messages\[0\].content\[1\] is of type 'image_url'; only parts of type 'text' can be trained",
        ),
        ("text", {"text": None}, "'text' must be text, got null"),
        ("text", {"text": " \n"}, "'text' is empty"),
        ("text", {"text": "a\0"}, "'text' holds a NUL byte"),
    ],
)
def test_row_that_is_not_in_its_format_is_refused(format, row, said):
    with pytest.raises(ValueError, match=said):
        read_conversation(row, format=format)


def test_digest_is_that_of_what_is_trained():
    rows = [read_conversation(row, format=format) for format, row in SHAPES]
    spaced = read_conversation({"prompt": " Hi\n", "completion": "\u3000Hello!"}, format="prompt_completion")
    assert {digest(row) for row in [*rows, spaced]} == {digest(rows[0])}
    others = [
        Conversation((Message("user", "Hi"), Message("assistant", "Hello"))),
        Conversation((Message("user", "HiHello!"), Message("assistant", ""))),
        Conversation((Message("user", "Hi"), Message("assistant", "Hello!", is_trained=False))),
        Conversation(text="Hi"),
    ]
    assert len({digest(row) for row in [rows[0], *others]}) == 1 + len(others)


@pytest.mark.parametrize("space", [" ", "\n", " \t\r\n", "\v\f", "\u00a0", "\u3000", "\u2028"])
def test_white_space_around_contents_is_taken_off_and_said(space):
    turns = [turn(role, f"{space}{role} two{space}words{space}") for role in ("system", "user", "assistant")]
    found = read_conversation({"messages": turns}, format="openai")
    assert [message.content for message in found.messages] == [
        f"{role} two{space}words" for role in ("system", "user", "assistant")
    ]
    assert found.was_stripped and not found.had_end
    assert not read_conversation(SHAPES[0][1], format="openai").was_stripped
