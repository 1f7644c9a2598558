#!/usr/bin/env bash
# Trains the digit classifier of the replica grader (Problem 1); the same command resumes. Flags go to p1_diffusion.study.train_classifier.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
exec "$PYTHON" -m p1_diffusion.study.train_classifier --run-dir "${RUNS_DIR:-$ROOT/runs}/p1_classifier" "$@"
