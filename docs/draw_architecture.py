"""Draw docs/architecture.svg: the rooms of the package by floor, and the way of a row through them.

python docs/draw_architecture.py
"""

import ast
import sys
import textwrap
from html import escape
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
WAY = ["data", "tokenizer", "train", "model", "runs", "export", "serve"]  # of a row, from its file to a served token
WIDTH, ROW, LEFT, CHARACTER, MAX_LINES = 900, 100, 20, 5.6, 4  # CHARACTER: the width of one
STYLE = """
text { font-family: system-ui, sans-serif; fill: #1f2328; font-size: 13px }
.name { font-weight: 600; font-size: 14px } .small { font-size: 11px; fill: #59636e }
rect { fill: #f6f8fa; stroke: #d1d9e0 } .on { fill: #ddf4ff; stroke: #0969da }
circle { fill: #0969da } .number { fill: #fff; font-size: 11px; font-weight: 600 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .small { fill: #9198a1 } rect { fill: #151b23; stroke: #3d444d }
  .on { fill: #121d2f; stroke: #4493f8 } circle { fill: #4493f8 } .number { fill: #0d1117 }
}
"""


def read_floors() -> list[list[str]]:
    """Return the rooms of each floor from the ground up, as the test of imports has them."""
    sys.path.insert(0, str(REPOSITORY))
    from tests.unit.test_floors import FLOOR

    return [[room for room, floor in FLOOR.items() if floor == number] for number in range(max(FLOOR.values()) + 1)]


def describe(room: str) -> str:
    """Return the first sentence of a room's docstring."""
    folder = REPOSITORY / "tune2gguf" / room
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    first = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))).splitlines()[0]
    return first.rstrip(".")


def draw_room(room: str, x: float, y: float, width: float) -> list[str]:
    on = ' class="on"' if room in WAY else ""
    parts = [
        f'<rect{on} x="{x:.0f}" y="{y}" width="{width:.0f}" height="{ROW - 12}" rx="6"/>',
        f'<text class="name" x="{x + 10:.0f}" y="{y + 22}">{escape(room)}</text>',
    ]
    lines = textwrap.wrap(describe(room), int((width - 16) / CHARACTER), max_lines=MAX_LINES, placeholder=" …")
    for number, line in enumerate(lines):
        parts.append(f'<text class="small" x="{x + 10:.0f}" y="{y + 39 + 14 * number}">{escape(line)}</text>')
    if room in WAY:
        center = x + width - 16
        parts.append(f'<circle cx="{center:.0f}" cy="{y + 17}" r="9"/>')
        number = WAY.index(room) + 1
        parts.append(f'<text class="number" text-anchor="middle" x="{center:.0f}" y="{y + 21}">{number}</text>')
    return parts


def draw() -> str:
    """Return the picture, the top floor first."""
    floors = read_floors()[::-1]
    parts = []
    for number, rooms in enumerate(floors):
        width = (WIDTH - 2 * LEFT + 10) / len(rooms) - 10
        for place, room in enumerate(rooms):
            parts += draw_room(room, LEFT + place * (width + 10), 10 + number * ROW, width)
    height = len(floors) * ROW + 10
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">'
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    (REPOSITORY / "docs/architecture.svg").write_text(draw(), encoding="utf-8")
