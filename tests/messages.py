"""List the package's error messages and printed lines, to be read in one go: python -m tests.messages [ROOM ...]"""

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = ("tune2gguf", "recipes")
PRINTING = ("print", "exit", "error", "write", "warn", "say")


def list_messages(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line number and text of each message in a file: what it raises, prints, or yields as a problem.

    Replacement fields of f-strings stay as they are written. Texts without a space are names, not messages.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            given = node.exc.args[:1]
        elif isinstance(node, ast.Call) and _get_name(node.func) in PRINTING:
            given = node.args[:1]
        elif isinstance(node, ast.Yield) and node.value is not None:
            given = [node.value]
        else:
            continue
        text = "".join(map(_read_text, given))
        if " " in text.strip():
            yield node.lineno, text.strip()


def _get_name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _read_text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_read_text, node.values))
    if isinstance(node, ast.FormattedValue):
        return f"{{{ast.unparse(node.value)}}}"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _read_text(node.left) + _read_text(node.right)
    return ""


def list_sources(rooms: list[str]) -> list[Path]:
    paths = [path for source in SOURCES for path in sorted((REPOSITORY / source).rglob("*.py"))]
    return [path for path in paths if not rooms or set(rooms) & set(path.relative_to(REPOSITORY).parts)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rooms", nargs="*", help="folders, such as config; all without")
    for source in list_sources(parser.parse_args().rooms):
        for line, text in list_messages(source):
            print(f"{source.relative_to(REPOSITORY)}:{line}: {text}")
