#!/usr/bin/env bash
# Trains the network in whose features faces are compared (Problem 2); the same command resumes. Flags go to p2_ddim.study.train_features.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
exec "$PYTHON" -m p2_ddim.study.train_features --run-dir "${RUNS_DIR:-$ROOT/runs}/p2_features" "$@"
