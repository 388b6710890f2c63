"""Five data sets that the verdict was not tuned on. A seed draws every row, so no file is kept.

python benchmarks/unseen_data.py arithmetic 5     # to look at: five rows of a set

Sums in words with their steps, English to Spanish, notes with one of four labels, a lighthouse keeper with a system
prompt, and entries of a weather log as plain text. All content is invented. Apache-2.0, like the repository.
"""

import json
import random
import sys
from collections.abc import Callable

NAMES = "Ada Boris Chiara Dov Esme Farid Greta Hana Ivo Jun Kemal Lucia Mbali Nils Olga Pavel".split()  # noqa: SIM905
THINGS = "apples pencils tickets shells bricks stamps buttons lemons candles marbles".split()  # noqa: SIM905

NOUNS = {
    "the cat": "el gato", "the dog": "el perro", "the doctor": "el médico", "the girl": "la niña",
    "the teacher": "el profesor", "the neighbour": "el vecino", "the cook": "el cocinero", "the queen": "la reina",
    "the sailor": "el marinero", "the baker": "el panadero", "the nurse": "la enfermera", "the thief": "el ladrón",
}  # fmt: skip
VERBS = {
    "sees": "ve", "buys": "compra", "sells": "vende", "carries": "lleva", "paints": "pinta", "finds": "encuentra",
    "breaks": "rompe", "hides": "esconde", "cleans": "limpia", "loses": "pierde",
}  # fmt: skip
OBJECTS = {
    "a red car": "un coche rojo", "an old book": "un libro viejo", "a small boat": "un barco pequeño",
    "a white house": "una casa blanca", "a new table": "una mesa nueva", "a heavy box": "una caja pesada",
    "a long letter": "una carta larga", "a broken clock": "un reloj roto", "a black umbrella": "un paraguas negro",
    "a warm coat": "un abrigo cálido", "a golden key": "una llave dorada", "a clean shirt": "una camisa limpia",
}  # fmt: skip
WHEN = {
    "today": "hoy", "every morning": "cada mañana", "on Sunday": "el domingo", "at night": "por la noche",
    "after the storm": "después de la tormenta", "in the market": "en el mercado", "near the river": "cerca del río",
}  # fmt: skip

COMPLAINTS = {
    "billing": ("was charged twice for {x}", "cannot find the invoice for {x}", "was refunded too little for {x}"),
    "delivery": ("have waited nine days for {x}", "got {x} at the wrong door", "see no news of where {x} is"),
    "defect": ("found a crack in {x}", "cannot switch {x} on any more", "hear {x} rattle since Monday"),
    "praise": ("love how {x} looks", "told three friends about {x}", "would buy {x} again at once"),
}
GOODS = [
    "my kettle",
    "the blue lamp",
    "my printer",
    "the garden hose",
    "my radio",
    "the toaster",
    "my bike light",
    "the fan",
]
OPENINGS = ("Hello, I {c}.", "I {c}, just so you know.", "{n} here. I {c}.", "Good day. We {c}, {n} and I.", "I {c}!")

KEEPER = "You are Maren, keeper of the Skarn lighthouse. Answer in two short sentences and name the wind."
ASKED = {
    "How was the night": ("The lamp burned till {h}", "I slept through to {h}", "Fog sat on us till {h}"),
    "Did any ship pass": ("A {b} went by at {h}", "Only a {b}, far out, near {h}", "Nothing since the {b} at {h}"),
    "What did you eat": ("{f} again, at {h}", "I boiled {f} at {h}", "The {b} brought {f} at {h}"),
    "Are you lonely": ("The {b} waves at {h}, that does me", "Not with {f} on the stove", "Ask me again at {h}"),
    "What are you mending": ("The hatch that the {b} hit", "A net, since {h}", "The stove, {f} boiled over it"),
}
BOATS = ("herring boat", "coal barge", "mail cutter", "grey trawler", "pilot launch")
FOODS = ("cod soup", "rye bread", "smoked eel", "pea stew", "salt potatoes")
WINDS = ("northerly", "westerly", "south-easterly", "north-westerly", "southerly")

SKIES = ("clear sky", "low cloud", "thin haze", "broken cloud", "steady rain", "wet snow", "fog on the water")
BIRDS = ("two terns", "a heron", "some eiders", "a lone gull", "nine swans", "no birds at all")


def make_sum(generator: random.Random) -> list[dict]:
    name, thing, other = generator.choice(NAMES), generator.choice(THINGS), generator.choice(NAMES)
    boxes, each, given = generator.randint(2, 9), generator.randint(3, 20), generator.randint(1, 5)
    total = boxes * each
    question = f"{name} has {boxes} boxes with {each} {thing} in each and gives {given} to {other}. How many are left?"
    answer = f"{boxes} boxes with {each} {thing} are {boxes} * {each} = {total}. {total} - {given} = {total - given}. "
    return _chat(question, answer + f"The answer is {total - given}.")


def make_translation(generator: random.Random) -> list[dict]:
    parts = [generator.choice([*one.items()]) for one in (NOUNS, VERBS, OBJECTS, WHEN)]
    english, spanish = (" ".join(part[side] for part in parts) for side in (0, 1))
    return _chat(f"Translate to Spanish: {english.capitalize()}.", f"{spanish[0].upper()}{spanish[1:]}.")


def make_note(generator: random.Random) -> list[dict]:
    label = generator.choice([*COMPLAINTS])
    complaint = generator.choice(COMPLAINTS[label]).format(x=generator.choice(GOODS))
    note = generator.choice(OPENINGS).format(c=complaint, n=generator.choice(NAMES))
    return _chat(f"Label this note with billing, delivery, defect or praise: {note}", label)


def make_keeper(generator: random.Random) -> list[dict]:
    asked = generator.choice([*ASKED])
    hour = f"{generator.choice(('two', 'three', 'four', 'five', 'six'))} o'clock"
    said = generator.choice(ASKED[asked]).format(b=generator.choice(BOATS), f=generator.choice(FOODS), h=hour)
    question = f"{asked}, Maren? {generator.choice(NAMES)} would like to know."
    answer = f"{said[0].upper()}{said[1:]}. The wind is {generator.choice(WINDS)}."
    return [{"role": "system", "content": KEEPER}, *_chat(question, answer)]


def make_log_entry(generator: random.Random) -> str:
    day, month = generator.randint(1, 28), generator.choice(("March", "April", "May", "June"))
    sky, bird, wind = generator.choice(SKIES), generator.choice(BIRDS), generator.choice(WINDS)
    low = generator.randint(-2, 9)
    entry = (
        f"{day} {month}, Skarn station. {sky.capitalize()} since dawn, wind {wind}, force {generator.randint(1, 8)}. "
    )
    entry += f"{low} degrees at six, {low + generator.randint(2, 8)} at noon. {bird.capitalize()} off the pier. "
    return entry + f"Barometer {generator.choice(('rising', 'falling', 'steady'))} at {generator.randint(985, 1030)}."


def _chat(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


UNSEEN: dict[str, Callable[[random.Random], list[dict] | str]] = {
    "arithmetic": make_sum,
    "translation": make_translation,
    "labels": make_note,
    "persona": make_keeper,
    "text": make_log_entry,
}


def make_unseen(name: str, num_rows: int, *, seed: int = 11) -> list[str]:
    """Return `count` different rows of a set, one JSON object per line."""
    generator = random.Random(f"{name} {seed}")
    rows: dict[str, None] = {}
    while len(rows) < num_rows:
        row = UNSEEN[name](generator)
        rows[json.dumps({"text": row} if isinstance(row, str) else {"messages": row}, ensure_ascii=False)] = None
    return [*rows]


if __name__ == "__main__":
    print("\n".join(make_unseen(sys.argv[1], int(sys.argv[2]))))
