#!/usr/bin/env bash
# Trains the face model (Problem 2). Running the same command again resumes. Flags are passed to
# p2_ddim.train.
set -euo pipefail
HELP_OF=p2_ddim.train
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
exec "$PYTHON" -m p2_ddim.train --run-dir "${RUNS_DIR:-$ROOT/runs}/p2_faces" "$@"
