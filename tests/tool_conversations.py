"""Conversations with tools of every kind that can be trained, for each format."""

from __future__ import annotations

import json
from functools import cache

from tune2gguf.data.messages import detect_format, read_conversation
from tune2gguf.tokenizer.conversation import Conversation


def define(name: str, description: str | None, properties: dict, *required: str, **more: object) -> dict:
    """Return a tool in OpenAI's form, with its keys in an arbitrary order, as clients send them."""
    function = {"parameters": {"properties": properties, "type": "object"}, "name": name, **more}
    function |= {} if description is None else {"description": description}
    function["parameters"] |= {"required": list(required)} if required else {}
    return {"function": function, "type": "function"}


PLAIN = define(
    "find_departures",
    "List the boats from one quay to another.",
    {
        "origin": {
            "type": "string",
            "description": "The quay where the trip begins",
            "enum": ["Reed Quay", "Port Alm"],
        },
        "after": {"description": "Only boats after this time, HH:MM", "type": "string"},
        "limit": {"type": "integer"},
        "Zone": {"type": ["integer", "null"], "enum": [1, 2.5, None, True]},
    },
    "origin",
    "after",
)
LISTS = define("book", "Book seats.", {"seats": {"items": {"type": "string"}, "type": "array"}, "any": {}}, "seats")
NOTHING = define("list_quays", None, {})
ODD = define("odd", 'Says <b>"hi"</b> & \\ more\nthan\ttwo lines; é 日本 🚢', {"a_b-c": {"description": "x > y"}})
EXTRA = define(
    "extra", "x", {"day": {"type": "string", "default": "today", "title": "Day", "format": "date"}}, strict=True
)  # fmt: skip
TOOL_LISTS = [[PLAIN], [PLAIN, LISTS], [NOTHING], [ODD, NOTHING, PLAIN], [EXTRA]]


def call(name: str, **arguments: object) -> dict:
    return {"id": f"call_{name}", "type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls: dict, content: str | None = None, **more: object) -> dict:
    return {"role": "assistant", "content": content, "tool_calls": list(calls), **more}


def result(content: object) -> dict:
    return {"role": "tool", "content": content}


SYSTEM = {"role": "system", "content": "You are Marlo.\n\nBe brief."}
ASK, ANSWER = {"role": "user", "content": "When does she sail?"}, {"role": "assistant", "content": "At 7:10."}
DEPART = call("find_departures", origin="Reed Quay", after="07:00", limit=2)
# Tool -> calls with arguments of every kind.
CALLS = {
    "find_departures": [DEPART, call("find_departures", after='a "b" \\ <c> & é 🚢\n', Zone=None, limit=2.0)],
    "book": [call("book", seats=["1A", "2<B"], any={"z": [1, 2.5, {"y": False}], "a": "x"}), call("book", seats=[])],
    "list_quays": [call("list_quays")],
    "odd": [call("odd", **{"a_b-c": "{{ .Role }} {% x %}", "B": 1e3, "b": 0.1})],
    "extra": [call("extra", day="Sunday")],
}
RESULTS = [
    "7:10, 9:40",
    '{"boats": ["7:10", "9:40"]}',
    {"boats": [7, 8.5], "by": {"Alm": None}},
    " padded \n",
    "<x> & é",
]
RESULTS += [[{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]]


def _rows_of_one_call() -> list[dict]:
    """Return rows that every format can express: one call per turn, and no text beside it."""
    rows = []
    for number, tools in enumerate(TOOL_LISTS):
        for system in ([], [SYSTEM], [{"role": "system", "content": ""}]):
            name = tools[0]["function"]["name"]
            for one in CALLS[name]:
                said = result(RESULTS[(len(rows) + number) % len(RESULTS)])
                rows += [
                    {"tools": tools, "messages": [*system, ASK, calling(one)]},
                    {"tools": tools, "messages": [*system, ASK, calling(one), said, ANSWER]},
                ]
    again = [calling(DEPART), result("full"), calling(CALLS["find_departures"][1]), result("7:10"), ANSWER]
    rows += [
        {"tools": [PLAIN], "messages": [ASK, ANSWER]},
        {"tools": [PLAIN], "messages": [SYSTEM, ASK, ANSWER, ASK, calling(DEPART)]},
        {"tools": [PLAIN], "messages": [ASK, *again]},
        {"tools": [PLAIN], "messages": [ASK, calling(DEPART, weight=0), result("7:10"), ANSWER, ASK, *again]},
        {"tools": json.dumps([PLAIN]), "messages": [ASK, calling(DEPART | {"function": _as_text(DEPART)})]},
        {"functions": [PLAIN["function"]], "messages": [ASK, {"role": "assistant", "function_call": _as_text(DEPART)}]},
        {"tools": [PLAIN["function"]], "system": "Be brief.", "messages": [ASK, calling(DEPART), result("x"), ANSWER]},
        {
            "tools": json.dumps([PLAIN["function"]]),
            "conversations": [
                {"from": "human", "value": "When?"},
                {"from": "function_call", "value": json.dumps(DEPART["function"])},
                {"from": "observation", "value": '{"boats": []}'},
                {"from": "gpt", "value": "None sails."},
            ],
        },
        {
            "tools": [PLAIN],
            "conversations": [
                {"from": "human", "value": "When?"},
                {"from": "function_call", "value": DEPART["function"]},
                {"from": "tool", "value": {"boats": 2}},
                {"from": "function_call", "value": [DEPART["function"]]},
            ],
        },
    ]  # fmt: skip
    return rows


def _as_text(one: dict) -> dict:
    return one["function"] | {"arguments": json.dumps(one["function"]["arguments"])}


def _rows_of_several_calls() -> list[dict]:
    """Return rows that only ChatML can express: several calls per turn, and text beside calls."""
    both = calling(*CALLS["find_departures"])
    tools = [PLAIN, LISTS]
    value = json.dumps([one["function"] for one in CALLS["find_departures"]])
    return [
        {"tools": tools, "messages": [ASK, both]},
        {"tools": tools, "messages": [SYSTEM, ASK, both, result("7:10"), result("9:40"), ANSWER]},
        {"tools": tools, "messages": [ASK, calling(DEPART, content="Let me see.")]},
        {"tools": tools, "messages": [ASK, both | {"content": "Both?"}, result("a"), result("b"), calling(DEPART)]},
        {"tools": tools, "messages": [ASK, calling(*CALLS["book"], DEPART), *map(result, "abc"), ANSWER, ASK, both]},
        {"tools": tools, "conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": value}]},
    ]  # fmt: skip


@cache
def make_tool_conversations(chat_template: str) -> list[Conversation]:
    """Return rows with tools as they are read."""
    rows = _rows_of_one_call() + (_rows_of_several_calls() if chat_template == "chatml" else [])
    return [read_conversation(row, format=detect_format(row)) for row in rows]
