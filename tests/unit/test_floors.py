"""A module imports from the floors below its own alone, wherever in it the import stands."""

import ast

from tests.conftest import REPOSITORY

FLOORS = (
    "tokenizer files pages guide", "model", "data base", "runs machine", "export verdict distributed",
    "config report serve", "train sweep inspect_data",
)  # fmt: skip
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}


def test_no_module_imports_from_its_own_floor_or_above():
    wrong = []
    for path in sorted((REPOSITORY / "tune2gguf").rglob("*.py")):
        room = path.relative_to(REPOSITORY / "tune2gguf").parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if room in FLOOR else ():
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"tune2gguf.{n}" for n in names] if node.module == "tune2gguf" else [node.module or "."]
            for _, other, *_ in (n.split(".") for n in names if n.startswith("tune2gguf.")):
                if other != room and FLOOR[other] >= FLOOR[room]:
                    wrong.append(f"{path}:{node.lineno} imports {names[0]}")
    assert wrong == []
