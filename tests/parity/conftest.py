import shutil
from pathlib import Path

import pytest

from tests.parity.go_renderer import build_renderer


@pytest.fixture(scope="session")
def go_renderer(tmp_path_factory) -> Path:
    """Return a compiled program around Go's template engine."""
    if shutil.which("go") is None:
        pytest.skip("Go is not installed (Debian: apt-get install golang-go)")
    return build_renderer(tmp_path_factory.mktemp("go"))
