"""Write a JSONL file of conversations with realistic lengths and turns. The seed determines every row.

python benchmarks/make_rows.py OUT.jsonl [--rows 100000] [--seed 0]
"""

import argparse
import json
import random
from pathlib import Path

WORDS = (  # noqa: SIM905
    "the of and to in a is that for it as was with be by on not he his but at are this have from or had "
    "an they which one you were all her she there would their we him been has when who will no more if "
    "out so up said what its about than into them can only other time new some could these two may first "
    "then do any like my now over such our man me even most made after also did many before must through "
    "years where much your way well down should because each just those people how too little state good "
    "very make world still see own work long day get here between both life being under never same "
    "another know while last might us great old year off come since against go came right used take three "
    "number system order model weight house water light large small again place high country school part "
    "during without however every found important question answer reason because problem example value "
    "result function table column index between therefore customer invoice shipment refund account "
    "password network server release version update manager engineer "
).split()
PUNCTUATION = [".", ".", ".", "?", "!", ",", ",", ",", ";", ":"]
CODE = "```python\ndef {0}({1}):\n    return {1} + {2}\n```"
OTHER_SCRIPTS = ["これは例です。", "Это пример.", "هذا مثال.", "Ceci est un exemple, déjà vu.", "这是一个例子。"]


def write_text(generator: random.Random, num_words: int) -> str:
    words = generator.choices(WORDS, weights=[1 / (rank + 5) for rank in range(len(WORDS))], k=num_words)
    pieces = []
    for position, word in enumerate(words):
        draw = generator.random()
        if draw < 0.02:
            word = str(generator.randrange(10_000))
        elif draw < 0.05:
            word = word.capitalize() + generator.choice("bdkmnrst") + word[::-1]
        pieces.append(word + (generator.choice(PUNCTUATION) if draw > 0.9 or position == num_words - 1 else ""))
    text = " ".join(pieces)
    if generator.random() < 0.05:
        text += "\n\n" + CODE.format(*generator.choices(WORDS, k=2), generator.randrange(100))
    if generator.random() < 0.05:
        text += " " + generator.choice(OTHER_SCRIPTS)
    return text[0].upper() + text[1:]


def make_row(generator: random.Random, *, max_exchanges: int = 4) -> dict:
    """Return a conversation of 1 to 4 exchanges, with log-normal lengths like those of chat data sets."""
    messages = []
    if generator.random() < 0.2:
        messages.append({"role": "system", "content": write_text(generator, generator.randrange(5, 40))})
    num_exchanges = generator.choices([1, 2, 3, 4], weights=[6, 2, 1, 1])[0]
    for _ in range(min(num_exchanges, max_exchanges)):
        messages.append({"role": "user", "content": write_text(generator, 1 + int(generator.lognormvariate(2.8, 0.8)))})
        reply = write_text(generator, 1 + int(generator.lognormvariate(4.2, 0.9)))
        messages.append({"role": "assistant", "content": reply})
    return {"messages": messages}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write conversations that look like real ones.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    with arguments.out.open("x", encoding="utf-8") as file:
        for _ in range(arguments.rows):
            file.write(json.dumps(make_row(generator), ensure_ascii=False) + "\n")
    print(f"wrote {arguments.out}: {arguments.rows} rows, {arguments.out.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
