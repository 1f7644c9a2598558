#!/usr/bin/env bash
# Makes the environment where it is missing, then runs ruff and pytest. Flags go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$ROOT"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
# A worker for each core, each with one thread; the tests of a file stay together, since they share what they make.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON" -m pytest --numprocesses logical --dist loadfile "$@"
