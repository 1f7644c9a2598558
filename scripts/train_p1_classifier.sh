#!/usr/bin/env bash
# Trains the digit classifier that replaces the grader's (Problem 1). Running the same command again
# resumes. Flags are passed to p1_diffusion.study.train_classifier.
set -euo pipefail
HELP_OF=p1_diffusion.study.train_classifier
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
exec "$PYTHON" -m p1_diffusion.study.train_classifier \
  --run-dir "${RUNS_DIR:-$ROOT/runs}/p1_classifier" "$@"
