#!/usr/bin/env bash
# Trains the network of the face features (Problem 2). Running the same command again resumes. Flags
# are passed to p2_ddim.study.train_features.
set -euo pipefail
HELP_OF=p2_ddim.study.train_features
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
exec "$PYTHON" -m p2_ddim.study.train_features --run-dir "${RUNS_DIR:-$ROOT/runs}/p2_features" "$@"
