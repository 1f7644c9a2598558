#!/usr/bin/env bash
# Trains the conditional digit model (Problem 1). Running the same command again resumes. Flags are
# passed to p1_diffusion.train.
set -euo pipefail
HELP_OF=p1_diffusion.train
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
exec "$PYTHON" -m p1_diffusion.train --run-dir "${RUNS_DIR:-$ROOT/runs}/p1_digits" "$@"
