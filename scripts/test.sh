#!/usr/bin/env bash
# Check style and run the whole test suite, a process per core; makes the environment if there is none.
# Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh dev
ruff check .
ruff format --check .
# A test file stays in one process, which keeps what its tests share; files with many short tests come last.
python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder "$@"
