from pathlib import Path

import pytest

from tests.conftest import write_tiny_base
from tests.gpu.models import SMALL, STD


@pytest.fixture(scope="session")
def small_base(tmp_path_factory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("bases") / "small", SMALL, std=STD)
