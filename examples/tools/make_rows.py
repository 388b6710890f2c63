"""Write the rows of this example: a ferry's timetable with two tools, questions and the calls that answer them.

    python examples/tools/make_rows.py

The same rows every time. Held-out questions have other wordings than the training ones, and other pairs of quays.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

NUM_TRAINING, NUM_HELD_OUT = 204, 40
QUAYS = [
    "Reed Quay", "Mill Bridge", "Willow Landing", "Heron Island", "Lighthouse Pier", "Abbey Steps", "Salt Market",
    "Otter Bend", "Chapel Wharf", "Long Meadow",
]  # fmt: skip
NUMBERS = ["one", "two", "three", "four", "five", "six"]
QUAY = {"type": "string"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "next_boat",
            "description": "The next boat between two quays",
            "parameters": {
                "type": "object",
                "properties": {
                    "after": {"type": "string"},
                    "destination": QUAY,
                    "origin": QUAY,
                },
                "required": ["origin", "destination"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "get_fare",
            "description": "The price of a trip",
            "parameters": {
                "type": "object",
                "properties": {"destination": QUAY, "origin": QUAY, "passengers": {"type": "integer"}},
                "required": ["origin", "destination", "passengers"],
            },
        },
    },
]
# {a} and {b} are quays, {t} a time, {n} a number in letters, {d} one in digits.
BOATS = {
    "train": [
        "When does the next boat go from {a} to {b}?", "I'm at {a} and want to get to {b}. When can I leave?",
        "Next boat {a} to {b}, please.", "How soon is there a ferry to {b} from {a}?",
        "I need to be in {b}. I start at {a}. What is the next boat?",
        "Is there a boat to {b} soon? I'm waiting at {a}.",
        "What's the next departure from {a} for {b}?", "Which boat do I take from {a} to reach {b}?",
    ],
    "held out": [
        "I'd like to travel from {a} to {b}. What is the next boat?",
        "When is the next ferry to {b}? I'm standing at {a}.",
        "Could you tell me when a boat leaves {a} for {b}?", "To {b} from {a}: when is the next one?",
    ],
}  # fmt: skip
LATER_BOATS = {
    "train": [
        "When does a boat go from {a} to {b} after {t}?", "I can be at {a} at {t}. When is a boat to {b}?",
        "Boats from {a} to {b} after {t}?", "What leaves {a} for {b} later than {t}?",
        "My shift ends at {t}. What is the next boat from {a} to {b}?", "Is there a ferry to {b} from {a} after {t}?",
        "We finish lunch at {a} by {t}. Which boat takes us to {b}?", "From {a} to {b}, not before {t}, please.",
    ],
    "held out": [
        "What is the first boat from {a} to {b} after {t}?", "I reach {a} at {t}. Which boat goes to {b} then?",
        "I want to go to {b} from {a}, after {t}.", "School ends at {t}. When is the next boat from {a} to {b}?",
    ],
}  # fmt: skip
FARES = {
    "train": [
        "How much is it from {a} to {b} for {n} people?", "What do {n} tickets from {a} to {b} cost?",
        "Price for {d} passengers, {a} to {b}?", "There are {n} of us going to {b} from {a}. What does it cost?",
        "What is the fare for {d} from {a} to {b}?", "How much would {n} of us pay from {a} to {b}?",
        "A trip to {b} from {a} for {n}: how much?", "We are {d} people at {a}. What do we pay to {b}?",
    ],
    "held out": [
        "What would it cost to take {n} people from {a} to {b}?", "Fare for {n} from {a} to {b}, please.",
        "We want to go from {a} to {b}, {d} of us. How much is that?", "How much are {d} tickets to {b} from {a}?",
    ],
}  # fmt: skip
TALK = {
    "train": [
        ("Hello!", "Hello! Which boat can I find for you?"), ("Thank you!", "You are welcome."),
        ("Who are you?", "I look up boats and fares on the River Tansy."), ("Good morning.", "Good morning! Where to?"),
        ("Bye!", "Goodbye, and a good trip."), ("That's all, thanks.", "You are welcome."),
        ("Can you help me?", "Yes, with boats and fares. Where do you start, and where to?"),
        ("Are you a person?", "No. I look up boats and fares on the River Tansy."),
    ],
    "held out": [
        ("Hi there!", "Hello! Which boat can I find for you?"), ("Thanks a lot!", "You are welcome."),
        ("What can you do?", "I look up boats and fares on the River Tansy."),
        ("Goodbye!", "Goodbye, and a good trip."),
    ],
}  # fmt: skip


def make_row(kind: int, side: str, place: int, pair: tuple[str, str], draw: random.Random) -> dict:
    """Return a row of a kind: 0 next boat, 1 later boat, 2 fare, 3 small talk."""
    origin, destination = pair
    hour, minute, number = draw.randrange(6, 22), draw.randrange(0, 60, 5), draw.randrange(1, 7)
    time = f"{hour}:{minute:02}"
    arguments: dict[str, object] = {"origin": origin, "destination": destination}
    if kind == 3:
        question, answer = TALK[side][place % len(TALK[side])]
        return {"tools": TOOLS, "messages": [_say("user", question), _say("assistant", answer)]}
    if kind == 2:
        name, templates, arguments = "get_fare", FARES, arguments | {"passengers": number}
        result = {"price": number * draw.choice([3, 4, 5, 7])}
        answer = f"That is {result['price']} pounds."
    else:
        name, templates = "next_boat", LATER_BOATS if kind == 1 else BOATS
        arguments |= {"after": time} if kind == 1 else {}
        result = {"departs": f"{hour + 1}:{draw.randrange(0, 60, 5):02}"}
        answer = f"The next boat from {origin} to {destination} leaves at {result['departs']}."
    template = templates[side][place % len(templates[side])]
    question = template.format(a=origin, b=destination, t=time, n=NUMBERS[number - 1], d=number)
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    messages = [_say("user", question), {"role": "assistant", "content": "", "tool_calls": [call]}]
    if side == "train" and place % 5 == 0:
        messages += [_say("tool", json.dumps(result)), _say("assistant", answer)]
    return {"tools": TOOLS, "messages": messages}


def _say(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def make_rows(side: str, count: int, pairs: list[tuple[str, str]], draw: random.Random) -> Iterator[dict]:
    """Yield distinct rows of every kind in turn."""
    kinds = [0, 1, 2, 0, 1, 2, 2, 1, 3] if side == "train" else [0, 1, 2, 0, 1, 2, 1, 2, 0, 3]
    seen: set[str] = set()
    place = 0
    while len(seen) < count:
        kind = kinds[place % len(kinds)]
        row = make_row(kind, side, place // len(kinds), pairs[place % len(pairs)], draw)
        place += 1
        # There is little small talk: each row of it is written once.
        if json.dumps(row) not in seen:
            seen.add(json.dumps(row))
            yield row


def split_pairs(draw: random.Random) -> dict[str, list[tuple[str, str]]]:
    """Return the pairs of quays of each side. No pair is on both."""
    pairs = [(one, other) for one in QUAYS for other in QUAYS if one != other]
    draw.shuffle(pairs)
    return {"train": pairs[20:], "held out": pairs[:20]}


def main(folder: Path = Path(__file__).parent, write: Callable[[str], None] = print) -> None:
    draw = random.Random(0)
    pairs = split_pairs(draw)
    for side, name, count in (("train", "train.jsonl", NUM_TRAINING), ("held out", "heldout.jsonl", NUM_HELD_OUT)):
        rows = list(make_rows(side, count, pairs[side], draw))
        if side == "train":
            draw.shuffle(rows)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        write(str(folder / name))


if __name__ == "__main__":
    main()
