"""A module imports only from floors below its own, also inside functions."""

import ast
from pathlib import Path

FLOORS = [
    "files pages guide commands ggml",
    "tokenizer",
    "model",
    "data base",
    "runs machine",
    "export verdict distributed",
]
FLOORS += ["config report serve", "train sweep inspect_data", "cli scripting"]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}


def test_no_module_imports_from_its_own_floor_or_above():
    root, wrong = Path(__file__).parents[2] / "tune2gguf", []
    for path in sorted(root.rglob("*.py")):
        room = path.relative_to(root).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if room in FLOOR else ():
            names = [alias.name for alias in getattr(node, "names", ()) if isinstance(alias, ast.alias)]
            names = [f"{node.module}.{name}" for name in names] if isinstance(node, ast.ImportFrom) else names
            others = {name.split(".")[1]: name for name in names if name.startswith("tune2gguf.")}
            wrong += [f"{path} imports {name}" for r, name in others.items() if r != room and FLOOR[r] >= FLOOR[room]]
    assert not wrong, "\n".join(wrong)
