#!/usr/bin/env bash
# Trains the ControlNet of circles (Problem 3, 2025); the same command resumes. Flags go to p3_controlnet.train, for example
# --fill50k hw2_data/fill50k to mix in the real pairs, or --base FOLDER for a base model that was just trained.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
exec "$PYTHON" -m p3_controlnet.train --run-dir "${RUNS_DIR:-$ROOT/runs}/controlnet_circles" "$@"
