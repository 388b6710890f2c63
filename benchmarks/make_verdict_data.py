"""Write two data sets of verdict_runs.py: orders as JSON, and unit conversions with their step.

python benchmarks/make_verdict_data.py benchmarks/data

Training and validation rows come from one distribution, without duplicates. The same seed gives the same bytes. All
content is invented. Apache-2.0, like the rest of the repository.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

NUM_TRAIN, NUM_VALIDATION, SEED = 220, 80, 7

NAMES = (  # noqa: SIM905
    "Priya Tomas Aiko Brigid Emeka Lotte Rashid Ingrid Mateo Yara Conor Nadia Felix Amara Oskar Leila Hugo Sanna Idris "
    "Petra Kwame Elif Bruno Maeve"
).split()
# No message says which van serves a city: it must be learned from rows with that city, and few rows miss many cities.
VANS = {
    "north": ("Bergen", "Turku", "Malmo", "Aarhus"),
    "south": ("Porto", "Trieste", "Vigo", "Lyon"),
    "east": ("Gdansk", "Basel", "Ghent", "Utrecht"),
    "west": ("Leeds", "Galway", "Bristol", "Cork"),
}
ITEMS = (  # noqa: SIM905
    "oak chair, desk lamp, wool blanket, tea pot, garden bench, wall clock, rain coat, "
    "bread board, picture frame, bicycle bell, flower pot, reading lamp, linen shirt, copper pan, "
    "step ladder, door mat, paper fan, sewing kit, candle holder, coffee mill"
).split(", ")
MONTHS = (  # noqa: SIM905
    "January February March April May June July August September October November December"
).split()
ORDERS = (
    "Hi, {name} from {city} here. Please send me {quantity} {items} by {day} {month}.",
    "Could you deliver {quantity} {items} to {city} on {month} {day}? The name is {name}.",
    "I need {quantity} {items}. I live in {city}, and {day} {month} would suit me. Thanks, {name}",
    "{name} in {city} wants {quantity} {items}, no later than {month} {day}.",
    "Good morning! This is {name}. Put {quantity} {items} on the van to {city} for {day} {month}, please.",
    "An order from {city}: {quantity} {items} for {name}, due {month} {day}.",
)
EXTRACTION_PROMPT = "Give the order as JSON with name, city, van, item, quantity and date (MM-DD).\n"

# (larger unit, smaller unit, smaller ones per larger one).
UNITS = (
    ("kilometres", "metres", 1000),
    ("metres", "centimetres", 100),
    ("centimetres", "millimetres", 10),
    ("kilograms", "grams", 1000),
    ("tonnes", "kilograms", 1000),
    ("litres", "millilitres", 1000),
    ("litres", "centilitres", 100),
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("years", "months", 12),
    ("feet", "inches", 12),
    ("yards", "feet", 3),
    ("pounds", "ounces", 16),
    ("gallons", "pints", 8),
    ("dozens", "eggs", 12),
    ("fathoms", "feet", 6),
)
QUESTIONS = (
    "How many {small} are {number} {large}?",
    "Convert {number} {large} to {small}.",
    "What is {number} {large} in {small}?",
    "I have {number} {large}. How many {small} is that?",
    "{number} {large}, in {small}?",
)


def make_order(generator: random.Random) -> tuple[str, str]:
    """Return a message with an order, and the order as JSON."""
    item, quantity = generator.choice(ITEMS), generator.randint(2, 40)
    month, day = generator.randrange(12), generator.randint(1, 28)
    van = generator.choice(list(VANS))
    order = {"name": generator.choice(NAMES), "city": generator.choice(VANS[van]), "van": van}
    order |= {"item": item, "quantity": quantity}
    template = generator.choice(ORDERS)
    message = template.format(items=f"{item}s", month=MONTHS[month], day=day, **order)
    return EXTRACTION_PROMPT + message, json.dumps({**order, "date": f"{month + 1:02}-{day:02}"})


def make_conversion(generator: random.Random) -> tuple[str, str]:
    """Return a question about units, and its answer with the calculation."""
    large, small, factor = generator.choice(UNITS)
    number = generator.randint(2, 30)
    question = generator.choice(QUESTIONS).format(large=large, small=small, number=number)
    return question, f"{number} x {factor} = {number * factor}. So {number} {large} are {number * factor} {small}."


def make_rows(make: Callable[[random.Random], tuple[str, str]], num_rows: int) -> list[str]:
    """Return `count` different conversations, one JSON object per line."""
    generator = random.Random(SEED)
    rows: dict[str, str] = {}
    while len(rows) < num_rows:
        question, answer = make(generator)
        rows[question] = answer
    return [
        json.dumps({"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]})
        for user, assistant in rows.items()
    ]


def write_data(folder: Path) -> list[Path]:
    """Write train.jsonl and heldout.jsonl of each set; return the paths."""
    written = []
    for name, make in (("orders", make_order), ("units", make_conversion)):
        rows = make_rows(make, NUM_TRAIN + NUM_VALIDATION)
        (folder / name).mkdir(parents=True, exist_ok=True)
        for split, part in (("train", rows[:NUM_TRAIN]), ("heldout", rows[NUM_TRAIN:])):
            written.append(folder / name / f"{split}.jsonl")
            written[-1].write_text("".join(f"{row}\n" for row in part), encoding="utf-8")
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the data sets of verdict_runs.py.")
    parser.add_argument("out", type=Path)
    for path in write_data(parser.parse_args().out):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
