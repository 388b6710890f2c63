import shutil
from pathlib import Path

import pytest

from tests.parity.go_renderer import build_renderer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what llama.cpp serves with a real vocabulary slow: writing and loading it takes seconds."""
    for item in items:
        if {"served", "bases"} <= set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def go_renderer(tmp_path_factory) -> Path:
    """Return a compiled program around Go's template engine."""
    if shutil.which("go") is None:
        pytest.skip("Go is not installed (Debian: apt-get install golang-go)")
    return build_renderer(tmp_path_factory.mktemp("go"))
