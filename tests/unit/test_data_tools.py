"""Rows with tools: OpenAI's and ShareGPT's formats give the same conversation, and errors are one line."""

import hashlib
import json

import pytest

from tests.conftest import write_rows
from tests.parity.gguf_models import SMALL_MODELS, write_small_run
from tests.tool_conversations import (
    ANSWER,
    ASK,
    CALLS,
    DEPART,
    EXTRA,
    LISTS,
    NOTHING,
    PLAIN,
    TOOL_LISTS,
    call,
    calling,
    define,
    make_tool_conversations,
    result,
)
from tune2gguf.data.messages import detect_format, digest, read_conversation
from tune2gguf.data.prepare import chat_dataset
from tune2gguf.data.show import format_summary
from tune2gguf.data.summary import summarize_data
from tune2gguf.data.tools import find_call_problem, read_tools
from tune2gguf.runs.validation_rows import format_validation_rows
from tune2gguf.tokenizer.conversation import Message, cut_before_reply, make_request_messages
from tune2gguf.tokenizer.tokenizer import load_tokenizer
from tune2gguf.tokenizer.tools import canonicalize_tool

READ_CALL = {"name": "find_departures", "arguments": {"after": "07:00", "origin": "Reed Quay", "limit": 2}}
AS_TEXT = {"name": "find_departures", "arguments": json.dumps(DEPART["function"]["arguments"])}
TURNS = [{"from": "human", "value": ASK["content"]}, {"from": "function_call", "value": json.dumps(DEPART["function"])}]


def read(row: dict):
    return read_conversation(row, format=detect_format(row))


@pytest.mark.parametrize(
    "row",
    [
        {"tools": [PLAIN], "messages": [ASK, calling(DEPART)]},
        {"tools": [PLAIN], "messages": [ASK, calling(DEPART, content="")]},
        {"tools": [PLAIN], "messages": [ASK, {"role": "assistant", "tool_calls": [DEPART]}]},
        {"tools": json.dumps([PLAIN]), "messages": [ASK, calling({"function": AS_TEXT})]},
        {"tools": [PLAIN["function"]], "messages": [ASK, calling(AS_TEXT)]},
        {"functions": [PLAIN["function"]], "messages": [ASK, {**calling(), "function_call": AS_TEXT}]},
        {"tools": [PLAIN], "conversations": TURNS},
        {"tools": [PLAIN], "conversations": [TURNS[0], TURNS[1] | {"value": DEPART["function"]}]},
        {"tools": [PLAIN], "conversations": [TURNS[0], TURNS[1] | {"value": [DEPART["function"]]}]},
    ],
)
def test_every_shape_of_a_call_is_the_same_conversation(row):
    conversation = read(row)
    assert conversation.messages == (
        Message("user", "When does she sail?"),
        Message("assistant", "", tool_calls=(READ_CALL,)),
    )
    assert conversation.tools == (canonicalize_tool(PLAIN),)
    assert digest(conversation) == digest(read({"tools": [PLAIN], "messages": [ASK, calling(DEPART)]}))


def test_a_definition_is_written_in_one_order_and_what_is_not_written_is_named():
    tools, unwritten = read_tools({"tools": [EXTRA, PLAIN]})
    assert json.dumps(tools[0]) == (
        '{"type": "function", "function": {"name": "extra", "description": "x", '
        '"parameters": {"type": "object", "properties": {"day": {"type": "string"}}}}}'
    )
    assert list(tools[1]["function"]["parameters"]["properties"]) == ["Zone", "after", "limit", "origin"]
    assert unwritten == (
        "tools[].function.strict",
        "properties.default",
        "properties.title",
        "properties.format",
    )
    row = {"tools": [EXTRA], "messages": [ASK, ANSWER]}
    assert read(row).unused_keys == unwritten


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("7:10", "7:10"),
        (" 7:10\n", "7:10"),
        ({"boats": [7]}, '{"boats": [7]}'),
        ([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}], "one\ntwo"),
        ([1, 2], "[1, 2]"),
        ("", ""),
    ],
)
def test_a_result_is_text_whatever_it_came_as(given, text):
    row = {"tools": [PLAIN], "messages": [ASK, calling(DEPART), result(given), ANSWER]}
    assert read(row).messages[2] == Message("tool", text)


def test_the_digest_tells_calls_and_definitions_apart_and_leaves_other_rows_as_they_were():
    rows = [
        {"messages": [ASK, ANSWER]},
        {"tools": [PLAIN], "messages": [ASK, ANSWER]},
        {"tools": [PLAIN, LISTS], "messages": [ASK, ANSWER]},
        {"tools": [PLAIN], "messages": [ASK, calling(DEPART)]},
        {"tools": [PLAIN], "messages": [ASK, calling(CALLS["find_departures"][1])]},
    ]
    assert len({digest(read(row)) for row in rows}) == len(rows)
    plain = repr(([("user", "When does she sail?", True), ("assistant", "At 7:10.", True)], None))
    assert digest(read(rows[0])) == hashlib.blake2b(plain.encode(), digest_size=16).digest(), (
        "as before there were tools"
    )


WRONG = [
    ({"tools": "[{"}, r"'tools': malformed JSON: .* at column 3"),
    ({"tools": {"name": "x"}}, '\'tools\' must be a list of tools, got {"name": "x"}'),
    ({"tools": [7]}, r"tools\[0\] must be an object, got 7"),
    ({"tools": [{}]}, r"tools\[0\]: 'function' must be an object, got null"),
    ({"tools": [{"type": "retrieval", "function": {}}]}, r"tools\[0\]: 'type' must be 'function', got 'retrieval'"),
    ({"tools": [{"function": {"name": " "}}]}, r"tools\[0\]: 'name' must be non-empty text, got \" \""),
    ({"tools": [define("x", 7, {})]}, "'description' must be text, got 7"),
    ({"tools": [PLAIN, PLAIN]}, "'tools' has two tools named 'find_departures'"),
    ({"tools": [PLAIN], "functions": [PLAIN]}, "the row has both 'tools' and 'functions'"),
    ({"tools": [{"name": "x", "parameters": {"type": "array"}}]}, "'parameters' must be of type 'object', got 'array'"),
    ({"tools": [define("x", "", {"a": 7})]}, "property 'a' must be an object, got 7"),
    ({"tools": [define("x", "", {"a": {"type": 7}})]}, "property 'a': 'type' must be a name or a list of names"),
    ({"tools": [define("x", "", {"a": {"enum": "b"}})]}, "property 'a': 'enum' must be a list"),
    ({"tools": [define("x", "", {"a": {}}, "b")]}, r"'required' must name properties, got \[\"b\"\]"),
    ({"tools": [define("x", "\ud83d", {})]}, "'tools' holds a lone surrogate"),
]


@pytest.mark.parametrize(("row", "said"), WRONG)
def test_a_definition_that_is_none_is_one_line(row, said):
    row = {"messages": [ASK, ANSWER], **row}
    with pytest.raises(ValueError, match=said) as error:
        read(row)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        (
            [ASK, calling(call("fly"))],
            "message 2 calls unknown tool 'fly'; the row's tools are find_departures",
        ),
        ([ASK, calling({"id": 1})], r"messages\[1\]: tool_calls\[0\]: 'name' must be non-empty text, got null"),
        ([ASK, calling("x")], r"messages\[1\]: tool_calls\[0\] must be an object, got \"x\""),
        ([ASK, {**ANSWER, "tool_calls": 7}], r"messages\[1\]: 'tool_calls' must be a list, got 7"),
        ([ASK, calling({"name": "find_departures", "arguments": "[1]"})], r"'arguments' must be an object, got \[1\]"),
        ([ASK, calling({"name": "find_departures", "arguments": "{"})], "'arguments': malformed JSON: .* at column 2"),
        (
            [ASK, calling(call("find_departures", limit=float("nan")))],
            "holds a number that JSON does not have, such as NaN",
        ),
        ([ASK, calling(call("find_departures", after="\ud83d"))], "holds a lone surrogate"),
        ([ASK, {**calling(DEPART), "function_call": AS_TEXT}], "has both 'tool_calls' and 'function_call'"),
        ([{**ASK, "tool_calls": [DEPART]}, ANSWER], "message 1 has role 'user' and calls a tool; only 'assistant' can"),
        ([ASK, result("x"), ANSWER], "message 2 has role 'tool', but no call before it lacks a result"),
        (
            [ASK, calling(DEPART), ANSWER],
            "message 3 has role 'assistant', expected 'tool'; 1 results of the calls before it are missing",
        ),
        (
            [ASK, calling(DEPART), result("x"), result("y"), ANSWER],
            "message 4 has role 'tool', but no call before it lacks a result",
        ),
        ([ASK, calling(DEPART), result("x"), ASK, ANSWER], "message 4 has role 'user', expected 'assistant'"),
        ([ASK, calling(DEPART), result("x")], "the last message has role 'tool', expected 'assistant'"),
        ([ASK, calling(DEPART), {**result("x"), "tool_call_id": "z"}, ANSWER], "tool_call_id 'z' matches no call"),
        ([ASK, calling(DEPART), result(None), ANSWER], r"messages\[2\]: 'content' must be text, got null"),
    ],
)
def test_calls_and_results_that_do_not_fit_are_one_line(turns, said):
    with pytest.raises(ValueError, match=said) as error:
        read({"tools": [PLAIN], "messages": turns})
    assert "\n" not in str(error.value)


def test_calls_without_definitions_and_raw_texts_with_them_are_refused():
    with pytest.raises(ValueError, match="message 2 calls unknown tool 'find_departures'; the row has no 'tools'"):
        read({"messages": [ASK, calling(DEPART)]})
    with pytest.raises(ValueError, match="a raw text cannot have tools"):
        read({"text": "Hi", "tools": [PLAIN]})


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("{", "malformed JSON"),
        ("[]", "holds no call"),
        ("7", "must be an object, got 7"),
        (json.dumps({"name": "fly", "arguments": {}}), "message 2 calls unknown tool 'fly'"),
    ],
)
def test_a_sharegpt_call_that_is_none_is_one_line(value, said):
    with pytest.raises(ValueError, match=said):
        read({"tools": [PLAIN], "conversations": [TURNS[0], {"from": "function_call", "value": value}]})


def test_what_a_format_has_no_place_for_is_a_bad_row_with_its_line(tmp_path):
    """Llama's format has neither several calls in a turn nor text beside a call. ChatML has both."""
    rows = [
        {"tools": [PLAIN], "messages": [ASK, calling(*CALLS["find_departures"])]},
        {"tools": [PLAIN], "messages": [ASK, calling(DEPART, content="Let me see.")]},
        {"tools": [PLAIN], "messages": [ASK, calling(DEPART)]},
    ]
    path = write_rows(tmp_path / "a.jsonl", rows)
    llama, _, chatml = (write_small_run(model, tmp_path / model.name).parent / "base" for model in SMALL_MODELS)
    options = {"max_seq_len": 4000, "seed": 1, "on_bad_row": "drop"}
    data = chat_dataset(str(path), tokenizer=load_tokenizer(llama, chat_template="llama3"), **options)
    assert [(row["line"], row["reason"]) for row in data.ledger["rows_dropped"]] == [
        (1, "Llama's format allows one call per turn, got 2; write one call after the other"),
        (2, "Llama's format allows no text beside a call, got 'Let me see.'; remove it"),
    ]
    data = chat_dataset(str(path), tokenizer=load_tokenizer(chatml, chat_template="chatml"), **options)
    assert data.ledger["rows_dropped"] == []


@pytest.fixture
def prepared(tmp_path, tiny_base):
    tokenizer = load_tokenizer(tiny_base, chat_template="chatml")
    rows = [
        {"tools": [PLAIN], "messages": [ASK, calling(DEPART), result("7:10, said the timetable"), ANSWER]},
        {"tools": [NOTHING], "messages": [{"role": "user", "content": "Hi"}, ANSWER]},
        {"messages": [{"role": "user", "content": "Bye"}, ANSWER]},
        {"tools": [PLAIN], "messages": [ASK, calling(call("find_departures", after="no-break\u00a0space"))]},
    ]
    options = {"files": str(write_rows(tmp_path / "a.jsonl", rows[:3]))}
    options["validation_files"] = str(write_rows(tmp_path / "v.jsonl", rows[3:]))
    return options, tokenizer, chat_dataset(**options, tokenizer=tokenizer, max_seq_len=4000, seed=1)


def test_supervised_are_calls_and_replies_and_neither_results_nor_definitions(prepared):
    _, tokenizer, data = prepared
    row = next(one for one in data.train if one.source.line == 1)
    text = tokenizer.decode(row.tokens[row.supervised].tolist())
    assert text == (
        '<tool_call>\n{"name": "find_departures", "arguments": '
        '{"after": "07:00", "origin": "Reed Quay", "limit": 2}}\n</tool_call><|im_end|>At 7:10.<|im_end|>'
    )
    rest = tokenizer.decode(row.tokens[~row.supervised].tolist())
    assert "<tool_response>\n7:10, said the timetable\n</tool_response>" in rest and "<tools>" in rest


def test_ledger_and_figures_know_rows_with_tools(prepared):
    options, tokenizer, data = prepared
    assert data.ledger["rows_with_tools"] == 2
    [note] = [note for note in data.ledger["notes"] if "unprintable" in note]
    assert "v.jsonl: rows with unprintable characters in tools or calls: 1 (lines 1)" in note
    summary = summarize_data(options, tokenizer=tokenizer, max_seq_len=4000, seed=1, batch_size=1, accumulation_steps=1)
    shown = format_summary(summary)
    assert "messages: 4 user, 5 assistant, 1 tool\n" in shown and "rows with tools: 2 of 3 training rows\n" in shown


def test_validation_rows_keep_tools_and_calls(prepared, tmp_path):
    _, _, data = prepared
    record = json.loads(format_validation_rows(data.validation))
    assert record["tools"] == [canonicalize_tool(PLAIN)]
    assert record["messages"][1]["tool_calls"] == [
        {"name": "find_departures", "arguments": {"after": "no-break\u00a0space"}}
    ]
    assert "tool_calls" not in record["messages"][0]


def test_a_request_links_results_to_calls_and_has_arguments_as_each_api_wants_them():
    row = {
        "tools": [PLAIN],
        "messages": [ASK, calling(*CALLS["find_departures"]), result("a"), result("b"), ANSWER],
    }
    prompt = cut_before_reply(read(row))
    sent = make_request_messages(prompt.messages)
    ids = [one["id"] for one in sent[1]["tool_calls"]]
    assert len(set(ids)) == 2 and [one["tool_call_id"] for one in sent[2:]] == ids
    assert json.loads(sent[1]["tool_calls"][0]["function"]["arguments"]) == READ_CALL["arguments"]
    objects = make_request_messages(prompt.messages, arguments_as_text=False)
    assert objects[1]["tool_calls"][0]["function"] == READ_CALL
    assert prompt.reference == "At 7:10."
    assert cut_before_reply(read(row | {"messages": row["messages"][:2]})).reference.startswith("find_departures({")


def test_what_clients_send_back_is_a_row_again():
    """Every conversation of the tests survives the way through a request."""
    for conversation in make_tool_conversations("chatml"):
        row = {"tools": list(conversation.tools), "messages": make_request_messages(conversation.messages)}
        again = read(row)
        assert [(one.role, one.content, one.tool_calls) for one in again.messages] == [
            (one.role, one.content, one.tool_calls) for one in conversation.messages
        ]
        assert again.tools == conversation.tools
    assert len(TOOL_LISTS) >= 5 and find_call_problem([Message("user", "Hi")], []) is None
