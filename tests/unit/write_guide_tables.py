"""Writes the guide's parameters from tune2gguf/guide.py into docs/parameters.md and the head of every config.

python -m tests.unit.write_guide_tables
"""

import re
from pathlib import Path

from tests.conftest import REPOSITORY
from tune2gguf.guide import GUIDE_PARAMETERS, GuideParameter

CONFIGS = sorted([*REPOSITORY.glob("configs/*/*.yaml"), *REPOSITORY.glob("examples/*/*.yaml")])
PAGE = REPOSITORY / "docs/parameters.md"
TABLE_HEAD = "| guide | key | default | becomes | effect |\n|---|---|---|---|---|\n"
CONFIG_HEAD = "# The guide's parameters. Each line: value, guide name -> component: effect.\n"


def write_guide_tables(path: Path) -> str:
    """Return the text of docs/parameters.md or of a config with a new table. A config keeps its values."""
    text = path.read_text(encoding="utf-8")
    if path == PAGE:
        before, rest = text.split(TABLE_HEAD)
        _, after = rest.split("\n\n", 1)
        return before + TABLE_HEAD + "\n".join(map(format_row, GUIDE_PARAMETERS)) + f"\n\n{after}"
    title, _, rest = text.split("\n\n", 2)
    values = dict(re.findall(r"^(\w+): (\S+)", text, re.MULTILINE))
    head = CONFIG_HEAD + "\n".join(format_line(parameter, values[parameter.key]) for parameter in GUIDE_PARAMETERS)
    return "\n\n".join((title, head, rest))


def format_row(parameter: GuideParameter) -> str:
    component = re.sub(r"[\w/]+\.\w+", r"`\g<0>`", parameter.component)
    cells = (parameter.guide, f"`{parameter.key}`", format_value(parameter.default), component, parameter.effect)
    return f"| {' | '.join(cells)} |"


def format_line(parameter: GuideParameter, value: str) -> str:
    return f"{f'{parameter.key}: {value}':<25} # {parameter.guide} -> {parameter.component}: {parameter.effect}"


def format_value(value: float | int | str) -> str:
    """Return a value as in a config: some YAML parsers read 1e-4 as text."""
    return f"{value:.1e}".replace("e-0", "e-") if isinstance(value, float) and value < 0.001 else str(value)


if __name__ == "__main__":
    for path in (PAGE, *CONFIGS):
        path.write_text(write_guide_tables(path), encoding="utf-8")
