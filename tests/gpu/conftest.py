import dataclasses
from pathlib import Path

import pytest

from tests.conftest import write_tiny_base
from tests.gpu.models import SMALL, STD


@pytest.fixture(scope="session")
def small_base(tmp_path_factory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("bases") / "small", SMALL, std=STD)


@pytest.fixture(scope="session")
def wide_base(tmp_path_factory) -> Path:
    """A base whose 4-bit weights have more than one block of scales, so that two processes can share them."""
    wide = dataclasses.replace(SMALL, embed_dim=256, head_dim=64, intermediate_dim=512)
    return write_tiny_base(tmp_path_factory.mktemp("bases") / "wide", wide, std=256**-0.5)
