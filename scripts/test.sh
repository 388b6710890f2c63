#!/usr/bin/env bash
# Check style and run the whole test suite; makes the environment if there is none. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh dev
ruff check .
ruff format --check .
python -m pytest "$@"
