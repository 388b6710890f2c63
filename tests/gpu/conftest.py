import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import write_tiny_base
from tests.gpu.models import SMALL, STD


@pytest.fixture(scope="session")
def small_base(tmp_path_factory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("bases") / "small", SMALL, std=STD)


@pytest.fixture(scope="session")
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads that each wait for one process: Python's start dominates and leaves the GPU idle."""
    pool = ThreadPoolExecutor(max(2, min(8, (os.cpu_count() or 1) // 2)))
    yield pool
    pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def recipe_runs(pool, small_base, tmp_path_factory) -> dict[tuple[str, str], Future]:
    """Start all runs of test_recipe."""
    from tests.gpu.test_recipe import start_runs

    return start_runs(pool, small_base, tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="session")
def compiled_cases(pool, small_base, tmp_path_factory) -> dict[tuple, Future]:
    """Start all cases of test_compiled_equals_eager."""
    from tests.gpu.compiled_case import start_cases

    return start_cases(pool, small_base, tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="session", autouse=True)
def what_takes_longest_goes_first(request) -> None:
    """Start this session's processes early: they run while earlier tests run."""
    for name in ("recipe_runs", "compiled_cases"):
        if any(name in item.fixturenames for item in request.session.items):
            request.getfixturevalue(name)
