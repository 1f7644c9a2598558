#!/usr/bin/env bash
# Trains the conditional digit model (Problem 1); the same command resumes. Extra flags go to p1_diffusion.train.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/python.sh
exec "$PYTHON" -m p1_diffusion.train --run-dir "${RUNS_DIR:-runs}/p1_digits" "$@"
