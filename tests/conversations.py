"""Conversations of every kind that can be trained, for tests that compare trained and served ids."""

from __future__ import annotations

from tune2gguf.data.messages import detect_format, read_conversation
from tune2gguf.tokenizer.conversation import Conversation, Message

ODD_CONTENTS = [
    " leading", "trailing \n", "\n\n both \t", "\v\f\r\n odd \r\n", "a\r\nb", "tab\tinside", "two\n\nlines\n\n\nthree",
    "\u00a0no-break\u00a0", "\u3000ideographic\u3000", "\ufeffbom", "\u200bzero width\u200b", "\u2028line", "x\u0085",
    "naïve café", "日本語のテキスト", "e\u0301 and é", "👩‍👩‍👧", "العربية", "1234567 12 3", "'s 'S 'll WE'VE",
    "```python\nfor x in y:\n    print(x)\n```", "<b>html</b> & \"quotes\" \\ back", "{{ jinja }} {% raw %} {# no #}",
    "{{ .Role }} {{- end }} {{ `go` }}", "< | not special | >", "<|", "|>", ".", "a", "#### Title\n- item\n  - nested",
    "$x_1^2$", "\x1f u", '"""', "assistant\n\nHi", "[INST]x[/INST] </s>", "null", "0",
]  # fmt: skip


def _turn(role: str, content: str, **more: int) -> dict:
    return {"role": role, "content": content, **more}


_USER, _ASSISTANT = _turn("user", "Does she sail?"), _turn("assistant", "She does.")
_SHAPES = [
    {"messages": [_USER, _ASSISTANT]},
    {"messages": [_turn("system", "You are Marlo."), _USER, _ASSISTANT]},
    {"messages": [_turn("system", ""), _USER, _ASSISTANT]},
    {"messages": [_turn("system", " Be brief.\n\nVery.\n"), _USER, _ASSISTANT, _USER, _turn("assistant", "Yes.")]},
    {"messages": [_USER, _turn("assistant", "No.", weight=0), _turn("user", "Sure?"), _ASSISTANT]},
    {"messages": [_USER, _ASSISTANT, _turn("user", "And now?"), _turn("assistant", "No."), _USER, _ASSISTANT]},
    {"conversations": [_USER, _ASSISTANT]},
    {"system": "Be brief.", "messages": [_USER, _ASSISTANT]},
    {"conversations": [{"from": "human", "value": "Hi\n"}, {"from": "gpt", "value": " Hello!<|im_end|>"}]},
    {"instruction": "Translate.", "input": " Hi", "output": "Salut"},
    {"system": "Translate.", "instruction": "Hi", "output": "Salut"},
    {"prompt": " Hi ", "completion": "Hello!"},
    {"system": "Be brief.", "prompt": "Hi", "completion": "Hello!"},
]


def make_conversations() -> list[Conversation]:
    """Return rows as they are read. Each ends with a reply, and together they have every odd content in every role."""
    odd = [
        {"messages": [_turn("system", system), _turn("user", question), _turn("assistant", reply)]}
        for question, reply, system in zip(ODD_CONTENTS, ODD_CONTENTS[1:], ODD_CONTENTS[2:], strict=False)
    ]
    return [read_conversation(row, format=detect_format(row)) for row in [*_SHAPES, *odd]]


def make_prompts() -> list[list[Message]]:
    """Return messages as clients send them.

    Rows up to their last reply and beyond it; the same with white space around every content; and with a prefill as the
    last message.
    """
    prompts = []
    for number, conversation in enumerate(make_conversations()):
        messages = list(conversation.messages)
        prompts += [messages[:-1], [*messages, Message("user", "And then?")], messages]
        spaced = [Message(one.role, f" {one.content}\n" if number % 2 else f"\n\n{one.content} ") for one in messages]
        prompts += [spaced[:-1], [*spaced, Message("user", "\tAnd then?\n")]]
    return prompts
