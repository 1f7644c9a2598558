#!/usr/bin/env bash
# Makes the environment if it is missing, then runs ruff and pytest. Arguments are passed to pytest;
# without any, all tests run, those of pages in a browser by themselves: a page waits where other
# tests take its cores.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$ROOT"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
# One worker with one thread for each core. The tests of a file run in one worker, since they share
# fixtures.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ $# -gt 0 ]; then
  exec "$PYTHON" -m pytest --numprocesses logical --dist loadfile "$@"
fi
"$PYTHON" -m pytest --numprocesses logical --dist loadfile --ignore tests/browser
exec "$PYTHON" -m pytest tests/browser
